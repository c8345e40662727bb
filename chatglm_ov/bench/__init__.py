"""How fast a model is here, beside what this machine could do at most.

limits    what the machine can do: read bandwidth, peak operation rate
weights   random weights at a model's shapes
models    converted folders of a checkpoint or of random weights
work      what a step reads and computes: bytes and operations
measure   times of one model, and of several in turns
report    figures made of the times: what goes into the JSON
tables    the same for people to read
picture   the same as bars
"""
