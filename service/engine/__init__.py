"""The inference engine: schedule, forward, sample, commit.

`engine` is what the event loop calls; `steps` runs on the step thread and does the four verbs. `scheduler` chooses the
next step and `cache` keeps track of the KV cache's slots, both pure; `ort` runs the graph on onnxruntime; `sampler`
chooses tokens, whose `scores` the cache keeps; `commit` turns them into pieces of text; `admission` limits the queue.
"""
