"""Tool calls as DeepSeek V3.1 writes them, for the scripts of `tests.helpers.scripted_model`."""

from __future__ import annotations

PARSER = "deepseek_v31"


def calls_text(*calls: tuple[str, str]) -> str:
    """One section of calls, each a function's name and the text of its arguments."""
    inner = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>" for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"
