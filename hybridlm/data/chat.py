"""Conventions of texts that the folder of a tokenizer states: the token that begins one, and the chat template.

Both are read in the forms in which transformers writes them: `tokenizer_config.json`, and `chat_template.jinja` or
`chat_template.json` beside it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridlm.errors import DataError

Message = Mapping[str, str]  # role and content


@dataclass(frozen=True)
class TextConventions:
    """Conventions of a model's texts.

    Args:
        tokens: texts of special tokens by name, such as `bos_token` and `eos_token`.
        chat_template: Jinja source that turns messages into one text; None: the model has none.
    """

    tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None

    @classmethod
    def of_folder(cls, folder: str | Path) -> TextConventions:
        """Read those of a checkpoint or of a model of transformers; empty where its files say nothing.

        Raises:
            DataError: a file that cannot be read.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        tokens = {}
        for name, value in config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens[name] = text
        template = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(template, list):  # several by name
            named = {item["name"]: item["template"] for item in template}
            template = named.get("default")
        return cls(tokens, template)

    def chat(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the model's next answer begins.

        The template runs in Jinja's sandbox, with the variables that transformers gives it.

        Args:
            messages: role and content of each message, the last one the user's.

        Raises:
            DataError: there is no template, or it refuses the messages.

        Example:
            >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
            >>> TextConventions(chat_template=template).chat([{"role": "user", "content": "hi"}])
            '<user>hi<assistant>'
        """
        if self.chat_template is None:
            raise DataError("the checkpoint has no chat template (chat_template.jinja, or in tokenizer_config.json); "
                            "write the prompt out, with --special-tokens where it spells them")
        from jinja2.exceptions import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self.chat_template).render(
                messages=[dict(message) for message in messages], add_generation_prompt=True, tools=None,
                documents=None, **self.tokens)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"the chat template refuses these messages: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from None
    return found if isinstance(found, dict) else {}
