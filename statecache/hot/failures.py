"""redis-py's errors, translated at the edge: which word they are to a flow, and which error to a caller."""

from __future__ import annotations

import redis

from statecache.core import errors, items

# The server answered, and will serve again later; the connection is dropped, because the address may lead elsewhere by then.
_UNREADY = (
    "LOADING",
    "READONLY",
    "MISCONF",
    "NOREPLICAS",
    "BUSY",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "MASTERDOWN",
    "MOVED",
    "ASK",
)
_NO_SUCH_DATABASE = ("DB index is out of range", "invalid DB index", "SELECT is not allowed")
# The server takes no entry of this epoch behind one of somebody else's with a higher id. The script may have written before.
_PASSED = "equal or smaller than the target stream top item"


def code_of(error: redis.RedisError | OSError, *, sent: bool) -> str:
    """The client-made code of ``core/items.py`` for a driver's error; ``ERROR`` for what no retry mends."""
    if isinstance(error, redis.exceptions.NoScriptError):
        return "NOSCRIPT"
    if isinstance(error, redis.OutOfMemoryError):
        return "OOM"
    if isinstance(error, (redis.BusyLoadingError, redis.ReadOnlyError)):
        return "UNREADY"
    if _is_denial(error):
        return "ERROR"
    if isinstance(error, redis.ResponseError) and _PASSED in str(error):
        return "LOST" if sent else "UNSENT"
    if isinstance(error, redis.ResponseError):
        # redis-py cuts the word off the errors it knows, and a script's error carries it in its middle.
        words = str(error).split(" ", 1)[0], *[word for word in _UNREADY if f"{word} " in str(error)]
        if any(word in _UNREADY for word in words):
            return "UNREADY"
        return "OOM" if "OOM " in str(error) else "ERROR"
    return "LOST" if sent else "UNSENT"


def _is_denial(error: redis.RedisError | OSError) -> bool:
    """Whether this user may not do that: a script is told so in the midst of another message."""
    known = isinstance(error, (redis.AuthenticationError, redis.exceptions.NoPermissionError))
    return known or (isinstance(error, redis.ResponseError) and "ACL failure in script" in str(error))


def translated(error: redis.RedisError | OSError, what: str) -> errors.StateCacheError:
    """The caller's error for a driver's error; its ``__cause__`` is the driver's."""
    code = code_of(error, sent=False)
    result: errors.StateCacheError
    if code == "OOM":
        result = errors.BackpressureError(f"Redis has no memory left ({what}): {error}")
    elif isinstance(error, redis.AuthenticationError):
        told = str(error).rstrip(".")
        result = errors.ConfigurationError(
            f"Redis refuses the login ({what}): check the user and the password in redis_url ({told})"
        )
    elif _is_denial(error):
        result = errors.ConfigurationError(
            f"Redis does not give this user a right that it needs ({what}): {error}; the rights of each role are in "
            "config/redis/users.acl of statecache's repository"
        )
    elif any(text in str(error) for text in _NO_SUCH_DATABASE):
        result = errors.ConfigurationError(
            f"Redis has no such database ({what}): check the number at the end of redis_url ({error})"
        )
    elif code == "ERROR" and "WRONGTYPE" in str(error):
        result = errors.IntegrityError(f"a key of this namespace holds what statecache did not write ({what}): {error}")
    elif code == "ERROR":
        result = errors.IntegrityError(f"a command failed on the server ({what}): {error}")
    elif _PASSED in str(error):
        result = errors.UnavailableError(
            f"a partition's log takes no entries ({what}): somebody else wrote to that stream under a higher id; "
            "a recovery mends that: a flusher's, when it comes to that record, or 'statecache recover'"
        )
    else:
        result = errors.UnavailableError(f"Redis did not answer ({what}): {type(error).__name__}: {error}")
    result.__cause__ = error
    return result


def outcome_of(error: redis.RedisError | OSError, *, sent: bool) -> items.Outcome:
    """A flow's outcome for a driver's error. ``cause`` is the error that the caller shall get if it cannot be mended."""
    return items.Outcome(code_of(error, sent=sent), [], 0, translated(error, "transition"))


_WORDS: dict[str, type[redis.ResponseError]] = {
    "NOSCRIPT": redis.exceptions.NoScriptError,
    "OOM": redis.OutOfMemoryError,
    "READONLY": redis.ReadOnlyError,
    "NOPERM": redis.exceptions.NoPermissionError,
}


def error_of_reply(text: str) -> Exception:
    """The driver's error for an error reply, for who reads replies without the driver."""
    word = text.split(" ", 1)[0]
    if word == "LOADING":
        return redis.BusyLoadingError(text)
    if word in ("NOAUTH", "WRONGPASS"):
        return redis.AuthenticationError(text)
    return _WORDS.get(word, redis.ResponseError)(text)
