"""A checkpoint folder: its weights, a block of rows at a time, checked and stacked as a model's graph reads them."""
