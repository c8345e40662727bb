"""int4 weights, and with GPTQ int8 ones, chosen by what a text makes of them: scaling by activations (AWQ), compensated
rounding (GPTQ).

`eager` runs the model on the text, layer by layer, `moments` sums up what each linear layer is given, `scaling` and
`rounding` choose its codes, `run` puts them together.
"""
