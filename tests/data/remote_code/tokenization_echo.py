"""A tokenizer whose ids are code points."""

from typing import ClassVar

from transformers import PreTrainedTokenizer


class EchoTokenizer(PreTrainedTokenizer):
    model_input_names: ClassVar = ["input_ids", "attention_mask"]
    vocab_size = 65536

    def get_vocab(self):
        return {chr(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)
