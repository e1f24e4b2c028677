"""See what a model runs

In: a model and what it is called with. Out: a `Trace`: operators in order, shapes, and calls that say a size.
A copy of the model's structure runs on fake tensors (`isolation`, `fake`, `tracer`); modules that hide what they do
say it in plain operators (`adapters`, `recurrent`); `checks` refuses what cannot be worked with.
"""
