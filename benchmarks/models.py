"Models by name, with an example input of their default size: `torchvision:NAME`, `timm:NAME`, `transformers:TYPE`"
import torch

def build(
    spec:str, # 'source:name', as in zoo.txt
)->tuple: # The model in eval mode, random weights, and what it is called with
    "Make a model and its example input"
    source,name = spec.split(':')
    if source not in SOURCES: raise ValueError(f"{spec!r}: the source is one of {', '.join(SOURCES)}, not {source!r}")
    torch.manual_seed(0)
    model,x = SOURCES[source](name)
    with torch.no_grad():
        for p in model.parameters(): # a head or a branch that begins at zero would hide every mistake behind it
            if p.is_floating_point() and p.numel() and p.flatten()[0].abs()<1e-2 and (p==p.flatten()[0]).all(): p.normal_(0, .02)
    return model.eval(),x

# torchvision

CLIPS = dict(r3d_18=(16,112), mc3_18=(16,112), r2plus1d_18=(16,112), s3d=(16,224), mvit_v1_b=(16,224), mvit_v2_s=(16,224), swin3d_t=(32,224), swin3d_s=(32,224), swin3d_b=(32,224))
DETECTORS = ('rcnn', 'retinanet', 'fcos', 'ssd')

def is_detector(spec:str)->bool: "Does it take a list of images?"; return spec.startswith('torchvision:') and any(d in spec for d in DETECTORS)

def torchvision(name):
    from torchvision import models
    kw = dict(weights=None)
    if any(d in name for d in DETECTORS+('deeplab', 'fcn', 'lraspp')): kw['weights_backbone'] = None
    if name in ('googlenet', 'inception_v3'): kw['init_weights'] = False # minutes of truncated normals
    m = models.get_model(name, **kw)
    for h in (m, getattr(m, 'roi_heads', None)): # random scores are below every threshold, and no box is no test
        if hasattr(h, 'score_thresh'): h.score_thresh = 0.
    return m,torchvision_input(name, m)

def torchvision_input(name, m):
    if name in CLIPS: t,s = CLIPS[name]; return torch.randn(1, 3, t, s, s)
    if any(d in name for d in DETECTORS):
        t = m.transform
        s = t.fixed_size[0] if getattr(t, 'fixed_size', None) else t.min_size[0]
        return ([torch.rand(3, s, s)],)
    s = getattr(m, 'image_size', None) or crop_size(name)
    return torch.randn(1, 3, s, s)

def crop_size(name):
    "Side of the square image that the published weights are evaluated on; the smallest if there are several"
    from torchvision.models import get_model_weights
    ts = [w.transforms() for w in get_model_weights(name)]
    return min((getattr(t, 'crop_size', None) or t.resize_size)[0] for t in ts)

def targets(
    model, # A detector
    n:int, # Images
    side:int, # Of an image
)->list:
    "One box an image, with a mask or key points where the model learns these"
    heads = getattr(model, 'roi_heads', None)
    def one():
        t = dict(boxes=torch.tensor([[.1,.1,.6,.7]])*side, labels=torch.tensor([1]))
        if heads is not None and heads.has_mask(): t['masks'] = torch.ones(1, side, side, dtype=torch.uint8)
        if heads is not None and heads.has_keypoint(): t['keypoints'] = torch.tensor([[[.3,.3,1/side]]*17])*side
        return t
    return [one() for _ in range(n)]

# timm

def timm(name):
    import timm
    m = timm.create_model(name, pretrained=False)
    return m,torch.randn(1, *m.default_cfg['input_size'])

# transformers: every size that a configuration has is made small

TINY = dict(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_key_value_heads=2, max_position_embeddings=64, head_dim=16,
    image_size=32, patch_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    n_embd=64, n_layer=2, n_head=4, n_positions=64, dim=64, n_layers=2, n_heads=4, hidden_dim=128, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, num_decoder_layers=2,
    encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, ffn_dim=128, word_embed_proj_dim=64, embedding_size=32)
OWN = dict( # What a type needs instead or besides
    resnet=dict(embedding_size=16, hidden_sizes=[16,32,64,64], depths=[1,1,1,1]), convnext=dict(hidden_sizes=[16,32,64,64], depths=[1,1,1,1], image_size=64),
    convnextv2=dict(hidden_sizes=[16,32,64,64], depths=[1,1,1,1], image_size=64), regnet=dict(embedding_size=16, hidden_sizes=[16,32,64,64], depths=[1,1,1,1], groups_width=16),
    gptj=dict(rotary_dim=8), efficientnet=dict(width_coefficient=1., depth_coefficient=1., hidden_dim=1280), deit=dict(architectures=['DeiTForImageClassification']), swin=dict(embed_dim=24, depths=[2,2], num_heads=[3,6], window_size=4, image_size=64, patch_size=4),
    swinv2=dict(embed_dim=24, depths=[2,2], num_heads=[3,6], window_size=4, image_size=64, patch_size=4),
    mobilevit=dict(hidden_sizes=[24,32,40], neck_hidden_sizes=[16,16,24,32,40,48,64], image_size=64, patch_size=2),
    segformer=dict(hidden_sizes=[16,32,64,64], depths=[1,1,1,1], num_attention_heads=[1,2,4,4], decoder_hidden_size=32, image_size=64),
    pvt=dict(hidden_sizes=[16,32,64,64], depths=[1,1,1,1], num_attention_heads=[1,2,4,4], patch_sizes=[4,2,2,2], image_size=64),
    electra=dict(embedding_size=32), albert=dict(embedding_size=32), whisper=dict(num_mel_bins=16, max_source_positions=32, max_target_positions=32, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None),
    wav2vec2=dict(conv_dim=[32,32], conv_stride=[5,2], conv_kernel=[10,3], num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0., vocab_size=32),
    hubert=dict(conv_dim=[32,32], conv_stride=[5,2], conv_kernel=[10,3], num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0., vocab_size=32),
    bloom=dict(hidden_size=64, n_layer=2, n_head=4), mamba=dict(state_size=8, time_step_rank=8))
HEADS = dict( # Task → (class, types); the other types are causal language models
    AutoModelForImageClassification='vit resnet convnext convnextv2 regnet deit swin swinv2 beit mobilevit segformer dinov2 pvt mobilenet_v2 efficientnet poolformer'.split(),
    AutoModelForSequenceClassification='bert distilbert roberta albert electra deberta deberta-v2 mpnet camembert xlm-roberta'.split(),
    AutoModelForSeq2SeqLM='t5 bart mt5 mbart pegasus'.split(), AutoModelForSpeechSeq2Seq=['whisper'], AutoModelForCTC=['wav2vec2', 'hubert'], AutoModel=['clip'])

def config(kind):
    "A small configuration of a model type"
    from transformers import AutoConfig
    has = AutoConfig.for_model(kind).to_dict()
    kw = {**{k:v for k,v in TINY.items() if k in has}, **OWN.get(kind, {})}
    for part in ('text_config', 'vision_config'):
        if isinstance(has.get(part), dict): kw[part] = {k:v for k,v in TINY.items() if k in has[part]}
    if kind=='clip': kw['projection_dim'] = 32
    return AutoConfig.for_model(kind, **kw)

def inputs(m, kind):
    "Tokens, an image or sound, by what the model takes"
    ids,main = torch.randint(3, 90, (1,16)),m.main_input_name
    side = getattr(m.config, 'image_size', 64) or 64
    if kind=='clip': return dict(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32))
    if main=='pixel_values': return dict(pixel_values=torch.randn(1, 3, *([side]*2 if isinstance(side, int) else side)))
    if main=='input_values': return dict(input_values=torch.randn(1, 1600))
    if main=='input_features': return dict(input_features=torch.randn(1, 16, 64), decoder_input_ids=ids, use_cache=False)
    if kind in HEADS['AutoModelForSeq2SeqLM']: return dict(input_ids=ids, decoder_input_ids=ids[:,:12], use_cache=False)
    return dict(input_ids=ids, **({} if kind in HEADS['AutoModelForSequenceClassification'] else dict(use_cache=False)))

def transformers(kind, base=False):
    import transformers as T
    auto = 'AutoModel' if base else next((a for a,kinds in HEADS.items() if kind in kinds), 'AutoModelForCausalLM')
    m = getattr(T, auto).from_config(config(kind))
    return m,inputs(m, kind)

SOURCES = {'torchvision':torchvision, 'timm':timm, 'transformers':transformers, 'transformers-base':lambda kind: transformers(kind, True)}

# what all of them share

def batch_of(x, n:int):
    "The same nest of tensors and images, `n` times along the batch"
    if isinstance(x, torch.Tensor): return torch.cat([x]*n)
    if isinstance(x, dict): return {k:batch_of(v, n) for k,v in x.items()}
    if isinstance(x, tuple): return tuple(batch_of(v, n) for v in x)
    return x*n if isinstance(x, list) else x
