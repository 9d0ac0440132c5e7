"""The inference engine: schedule, forward, sample, commit.

`engine` owns the step thread; `scheduler` plans and `cache` keeps the books, both pure; `ort` runs the graph by
onnxruntime; `sampler` chooses tokens; `commit` turns them into pieces of text.
"""
