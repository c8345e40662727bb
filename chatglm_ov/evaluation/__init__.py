"""How well a model predicts a text, and how near it stays to another one: what `chatglm-ov eval` does."""
