from typing import TypedDict

class EvalResults(TypedDict):
    results: dict[str, dict[str, float]]
    samples: dict[str, list[dict[str, object]]]
