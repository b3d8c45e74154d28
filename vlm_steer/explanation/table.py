"""An explanation as a table, one row per word."""

from typing import TYPE_CHECKING, Any

from vlm_steer.errors import ConfigError

if TYPE_CHECKING:
    from vlm_steer.explanation.result import Arm

__all__ = ["require_pandas", "word_rows"]

_CHECKED = ("logprob", "without_cells", "without_others", "without_image")


def require_pandas() -> Any:
    """The module, imported when it is needed.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import pandas  # type: ignore[import-untyped]  # ships no types
    except ImportError:
        raise ConfigError(
            "a data frame needs pandas, which is not installed: pip install pandas. to_json() "
            "needs nothing."
        ) from None
    return pandas


def word_rows(arm: "Arm") -> list[dict[str, Any]]:
    """What is known about every word of an answer."""
    trace = arm.trace
    masses = trace.masses.mean(dim=(1, 2))
    rows = []
    for number, word in enumerate(arm.words):
        tokens = slice(*word.tokens)
        row = {
            "arm": arm.name,
            "number": number,
            "word": word.text,
            "start": word.span[0],
            "end": word.span[1],
            "logprob": float(trace.logprob[tokens].sum()),
            "risk_by_place": arm.position[number],
        }
        row |= {f"risk_{name}": values[number] for name, values in arm.risk.items()}
        shares = masses[tokens].mean(dim=0).tolist()
        row |= {
            f"mass_{name}": share for name, share in zip(trace.layout.blocks, shares, strict=True)
        }
        check = arm.checks.get(number)
        row |= {f"check_{name}": getattr(check, name, float("nan")) for name in _CHECKED}
        rows.append(row)
    return rows
