"""Chat format of ChatGLM3-6B."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

from chatglm_ov.chat.base import ChatDefaults, Message
from chatglm_ov.chat.roles import ASSISTANT, ROLE_STOPS, RolesFormat, as_objects


class ChatGLM3Format(RolesFormat):
    """`[gMASK] sop`, then per message its role token, the line of metadata, the content. Each of the two texts is
    encoded by itself, so that each gets the space that sentencepiece puts before a text. Role tokens that somebody
    typed stay text."""

    name = "chatglm3"
    defaults = ChatDefaults(max_length=8192, top_p=0.8, temperature=0.8)
    tools_system_text = "Answer the following questions as best as you can. You have access to the following tools:"

    def stop_token_ids(self, tokenizer: Any) -> list[int]:
        return [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(ROLE_STOPS))]

    def conversation_text(
        self, tokenizer: Any, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = True
    ) -> str:
        parts = [f"<|{role}|>{metadata}\n {content}" for role, metadata, content in self._turns(messages, tools)]
        return "[gMASK]sop" + "".join(parts) + (ASSISTANT if add_generation_prompt else "")

    def conversation_ids(
        self, tokenizer: Any, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = True
    ) -> list[int]:
        ids = tokenizer.convert_tokens_to_ids(["[gMASK]", "sop"])
        for role, metadata, content in self._turns(messages, tools):
            ids.append(tokenizer.convert_tokens_to_ids(f"<|{role}|>"))
            ids += tokenizer.encode_ordinary(f"{metadata}\n") + tokenizer.encode_ordinary(content)
        return [*ids, tokenizer.convert_tokens_to_ids(ASSISTANT)] if add_generation_prompt else ids

    def continued_text(self, tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> str:
        return self.conversation_text(tokenizer, messages, tools, add_generation_prompt=False)

    def continued_ids(self, tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """No token ends a message, so each is left open."""
        return self.conversation_ids(tokenizer, messages, tools, add_generation_prompt=False)

    def _turns(self, messages: Sequence[Message], tools: Any) -> list[tuple[str, str, str]]:
        """(role, metadata, content) of each message; the tools stand as JSON below the system text."""
        turns = []
        for message in self.with_tools(messages, as_objects(tools)):
            content = message["content"]
            if message["role"] == "system" and "tools" in message:
                content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
            turns.append((message["role"], message.get("metadata") or "", content))
        return turns

    def parse_arguments(self, content: str) -> Any:
        """The keyword arguments in a fenced `tool_call(name=literal, ...)`: first and last line are the fence."""
        code = "\n".join(content.strip().split("\n")[1:-1]).strip()
        try:
            expression = ast.parse(code, mode="eval").body
            if not isinstance(expression, ast.Call):
                return ast.literal_eval(expression)
            if expression.args or not isinstance(expression.func, ast.Name) or expression.func.id != "tool_call":
                raise ValueError(code)
            if any(keyword.arg is None for keyword in expression.keywords):
                raise ValueError(code)
            return {keyword.arg: ast.literal_eval(keyword.value) for keyword in expression.keywords}
        except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
            raise ValueError(code) from error
