"""int4 weights chosen by what a text makes of them: scaling by activations (AWQ), compensated rounding (GPTQ).

`eager` runs the model on the text, layer by layer, `moments` sums up what each linear layer is given, `scaling` and
`rounding` choose its codes, `run` puts them together.
"""
