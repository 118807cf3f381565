"""Errors in the form that OpenAI's clients understand: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

__all__ = ["ApiError", "ErrorBody", "body_of", "install", "responses"]

log = logging.getLogger(__name__)

MEANING = {
    400: "The request cannot be served as it stands.",
    401: "The key is missing or wrong.",
    404: "There is no such model or route.",
    429: "Too many requests wait; come again after Retry-After seconds.",
    500: "The server failed.",
    503: "The model is not loaded yet, or the server stops.",
}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error."""

    error: ErrorDetail


class ApiError(Exception):
    """An error that the client is told.

    Parameters
    ----------
    status : int
        Of HTTP.
    message : str
        One line, with the value seen and the remedy.
    code, param : str, optional
        OpenAI's word for it, and the field at fault.
    retry_after : int, optional
        Seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def response(self) -> JSONResponse:
        return JSONResponse(body_of(self.status, self.message, self.code, self.param), self.status, self.headers)


def body_of(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error as plain data."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code)).model_dump()


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what the OpenAPI description says of these errors."""
    return {status: {"model": ErrorBody, "description": MEANING[status]} for status in statuses}


def install(app: FastAPI, forms: Mapping[str, str]) -> None:
    """Let every error of an application, its own and FastAPI's, leave in this form.

    `forms` tells of fields that may be one thing or another what they may be.
    """

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return cast(ApiError, error).response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
        place = [str(part) for part in first.get("loc", ()) if part != "body"]
        what, kind = first.get("msg", "invalid request"), first.get("type")
        sent = request.headers.get("content-type", "nothing").partition(";")[0]
        if kind == "json_invalid":
            what, place = "the body is not valid JSON", []
        elif not place and request.method == "POST":
            is_json = sent.startswith("application/") and sent.endswith("json")
            what = (
                "the body is no JSON object" if is_json else f"the body is {sent}: send Content-Type: application/json"
            )
        either = next((index for index, part in enumerate(place) if part in forms and kind != "missing"), None)
        if either is not None:
            if str(kind).endswith(("_type", "_unicode")):
                what = f"give {forms[place[either]]}, in valid Unicode"
            place = place[: either + 1]
        param = ".".join(place) or None
        return ApiError(400, what if param is None else f"{param}: {what}", param=param).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 500
        detail = str(getattr(error, "detail", ""))
        message = f"{request.method} {request.url.path}: {detail}"
        answer = ApiError(status, message).response()
        answer.headers.update(getattr(error, "headers", None) or {})
        return answer

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        return ApiError(500, "the server failed; its log says why").response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unforeseen)
