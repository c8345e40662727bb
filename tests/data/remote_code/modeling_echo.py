"""A model with code of its own, as the published checkpoints have it: it repeats its prompt."""

import os

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

os.environ["REMOTE_CODE_WAS_RUN"] = "1"


class EchoConfig(PretrainedConfig):
    model_type = "echo"


class EchoModel(PreTrainedModel, GenerationMixin):
    config_class = EchoConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.period = 1
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        """Logits of the token that stands `period` before the next one."""
        logits = torch.nn.functional.one_hot(input_ids[:, -self.period], self.config.vocab_size)
        return CausalLMOutputWithPast(logits=self.scale * logits[:, None])

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    @torch.inference_mode()
    def chat(self, tokenizer, query, history=None, max_length=8192, do_sample=True, **kwargs):
        inputs = tokenizer([query], return_tensors="pt")
        self.period = inputs["input_ids"].shape[1]
        output = self.generate(**inputs, max_length=max_length, do_sample=do_sample, use_cache=False, **kwargs)
        response = tokenizer.decode(output[0, self.period :].tolist())
        return response, [*history, (query, response)]
