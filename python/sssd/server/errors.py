"""What a client is told when a request cannot be served."""

from typing import Any


class ApiError(Exception):
    """A refusal or a failure, in the words of OpenAI's interface.

    Args:
        status: HTTP status.
        message: What was wrong and what to do.
        param: The field of the body that was wrong.
        code: A word for programs.
        headers: To send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """What goes over the wire."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong, and will be when it is sent again."""
    return ApiError(400, message, param=param, code=code)


def too_busy(message: str) -> ApiError:
    """The request may come again in a moment."""
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def closing() -> ApiError:
    """The server is about to end."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})
