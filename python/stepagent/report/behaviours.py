"""What ``stepagent behaviours`` found, as the page's section shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shares(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Behaviours and their shares at each point; None without any.

    Raises:
        ValueError: for what ``stepagent behaviours --output`` did not write.
    """
    if found is None:
        return None
    try:
        changed = {change["point"]: change["p"] for change in found["changes"]}
        return {
            "gain": found["gain"],
            "kinds": [
                {**kind, "exemplars": [f"{e['run']}, seed {e['seed']}" for e in kind["exemplars"]]}
                for kind in found["behaviours"]
            ],
            "points": [
                {
                    "name": point["run"],
                    "cycle": point["cycle"],
                    "shares": [float(share) for share in point["shares"]],
                    "changed": changed.get(place),
                }
                for place, point in enumerate(found["points"])
            ],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"behaviours must be what stepagent behaviours --output wrote, got {error!r}"
        ) from error
