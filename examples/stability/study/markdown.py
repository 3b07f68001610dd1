"""Markdown tables, and numbers as they stand in them."""

NONE = "–"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table; shorter rows are filled up."""
    full = [row + [NONE] * (len(head) - len(row)) for row in rows]
    lines = [head, ["---"] * len(head), *full]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str = ".3f") -> str:
    """A number in a format, or a dash."""
    return NONE if value is None else f"{value:{form}}"
