"Which dimensions of an attention are free groups, found from the operators alone"
import numpy as np
from fasterprune.surgery.capture.trace import Ref

OUTPUT = 'the output of the model keeps its shape'

def rank(v): return [False, 'output', True].index(v)

def products(c)->dict:
    "Module path → its products of two tensors that both depend on the input, as `Reader`s"
    l,res = c.labels,{}
    for r in l.reads:
        if r.weight is not None and not l.is_param(r.weight) and not l.is_param(r.data) and 'convolution' not in c.labels.trace.nodes[r.node].op:
            res.setdefault(c.labels.trace.nodes[r.node].module, []).append(r)
    return res

def axes(c, r)->tuple:
    "The (batch axes, other axes) of a product"
    node = c.labels.trace.nodes[r.node]
    refs = [a for a in node.args if isinstance(a, Ref)][-2:]
    sides = [c.labels.env[ref.id] for ref in refs]
    return [a for s in sides for a in s[:-2]],[a for s in sides for a in s[-2:]]

def roots(c, a)->np.ndarray:
    "Every label of an axis"
    return np.zeros(0, int) if a.open else np.unique(c.labels.expand(a.rows))

def groups_in(c, found)->set:
    "Names of the free groups that these axes belong to"
    ls = np.unique(np.concatenate([roots(c, a) for a in found]+[np.zeros(0, int)]))
    ls = ls[(ls>0) & ~c.labels.pinned[ls]]
    return {g.name for g in c.groups if np.isin(g.labels, ls).any()}

def embedding_axes(c, r)->list:
    "What the layers read that write the two sides of a product"
    made = {o.id:n for n in c.labels.trace.nodes for o in n.outs}
    reads = {x.node:x for x in c.labels.reads if x.weight is not None and (c.labels.is_param(x.weight) or c.labels.is_param(x.data))}
    todo,seen,res = [r.data, r.weight],set(),[]
    while todo:
        node = made.get(todo.pop().id)
        if node is None or node.index in seen or node.op.startswith('new_') or node.op.endswith('_like'): continue # the last two take a shape only
        seen.add(node.index)
        if node.index in reads: res.append(reads[node.index].axis)
        else: todo += [a for a in flat((node.args, tuple(node.kwargs.values()))) if isinstance(a, Ref) and a.id in c.labels.dep]
    return res

def flat(o): return [i for v in o for i in flat(v)] if isinstance(o, (tuple, list)) else [o]

def n_heads(c, path:str)->int:
    "Number of heads by the attribute of the module or of the one around it; 0 if none says"
    for p in (path, path.rpartition('.')[0]):
        m = c.model.get_submodule(p)
        for k in ('num_heads', 'n_heads', 'num_attention_heads', 'heads', 'n_head'):
            if isinstance(getattr(m, k, None), int): return getattr(m, k)
    return 0

def reasons(c, path:str, found)->list:
    "Why these axes are not free: the reasons of their pins, else those of the layers in the module"
    l = c.labels
    ls = np.unique(np.concatenate([roots(c, a) for a in found]+[np.zeros(0, int)]))
    own = {l.reasons[l.why[i]] for i in ls[ls>0] if l.pinned[i]}
    return sorted(own or {f"{n}: {why}" for n,_,_,why in c.pins() if n.startswith(path)})[:3]

def attention(c)->dict|None:
    "Are heads, head dimensions, embedding and MLP free groups? With the reason where not; None without attention"
    rows,used,per = [],set(),dict(heads=set(), head_dim=set(), embed=set())
    for path,reads in products(c).items():
        if len(reads)<2: continue # queries with keys, and what comes of it with values
        sides,row = [axes(c, r) for r in reads],dict(module=path)
        batch,inner = [a for b,_ in sides for a in b],[o for _,o in sides]
        wide = [a for r in reads for a in embedding_axes(c, r)]
        names = dict(heads=groups_in(c, batch), head_dim=groups_in(c, sum(inner, [])), embed=groups_in(c, wide)-groups_in(c, batch)-groups_in(c, sum(inner, [])))
        ok = dict(heads=bool(names['heads']) or n_heads(c, path)==1 or all(a.n==1 for a in batch), head_dim=all(groups_in(c, i) for i in inner), embed=all(groups_in(c, [a]) for a in wide) and bool(wide))
        for k,why in (('heads', batch), ('head_dim', sum(inner, [])), ('embed', wide)):
            row[k] = ok[k]
            if not ok[k]: row[f'{k}_why'] = reasons(c, path, why)
            if k=='embed' and OUTPUT in row.get('embed_why', ()): row[k] = 'output' # what the model returns keeps its width
            per[k] |= names[k]
        rows.append(row)
    if not rows: return None
    used = set().union(*per.values())
    mlp = sorted(g.name for g in c.groups if g.name not in used and g.role('write') and g.role('read'))
    return dict(attentions=len(rows), **{k:min((r[k] for r in rows), key=rank) for k in per}, mlp=bool(mlp), groups={k:sorted(v) for k,v in per.items()},
        missing=[r for r in rows if not all(r[k] for k in per)][:8])
