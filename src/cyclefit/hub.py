"""Whether the hub answers."""

import os
import threading
from functools import cache


@cache
def silence_of(endpoint: str) -> str | None:
    """Why the hub does not answer, or None if it does; asked once, answered within five seconds."""
    from huggingface_hub import get_session

    limit = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 4)
    replies = [f"no answer within {limit:g} s; HF_HUB_ETAG_TIMEOUT=30 waits longer"]

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=limit)
            replies.append("")
        except Exception as error:  # whatever the client's library raises
            if "timed out" not in str(error):
                replies.append(str(error))

    # A thread, because no timeout holds for the look-up of a name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(limit)
    return f"{endpoint} does not answer: {replies[-1]}" if replies[-1] else None
