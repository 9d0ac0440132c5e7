"""The inference engine: schedule, forward, sample, commit.

`engine` owns the step thread; `scheduler` plans and `cache` keeps the books, both pure; `model` runs the graph;
`sampler` chooses tokens; `commit` turns them into pieces of text.
"""
