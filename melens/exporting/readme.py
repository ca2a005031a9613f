"""The README.md of an exported model folder: what loads it right, and what does not."""

from __future__ import annotations

from melens.formatting import clipped
from melens.results.export import EditFile

README = "README.md"
WARNING = (
    "loaded by transformers, vLLM or anything but melens, this folder is the model WITHOUT the "
    "edit, and nothing says so"
)
_TEXT = """# {model}, with an edit kept beside it

**{warning}.** The weights here are those of `{model}`, unchanged. The edit
(`{edit}`) is in `melens.json`; it acts while the model runs.

This loads the model with its edit, in force on every forward pass and in `generate`:

```python
import melens

model = melens.load(".")  # the path of this folder
print(model.melens_edit)
```

On the command line, side by side with the model that is not edited:

```text
melens generate PATH-OF-THIS-FOLDER --prompt "Once upon a time"
```

For use without melens export the same edit again as `--format prefix` or `--format peft`: with a
fixed first token these hold what the mask does to it.
"""


def readme(record: EditFile) -> str:
    """The text for one export."""
    warning = WARNING[:1].upper() + WARNING[1:]
    model, edit = (
        clipped(text).replace("`", "'") for text in (record.run.model, record.edit.label)
    )
    return _TEXT.format(model=model, edit=edit, warning=warning)
