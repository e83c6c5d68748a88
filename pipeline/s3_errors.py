"""What S3 and botocore complain of, in one line that says what to do."""

from __future__ import annotations

from botocore import exceptions
from botocore.exceptions import ClientError

_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_REGION = "the bucket is in another region; set AWS_REGION to the bucket's"
_OVERLOADED = ("SlowDown", "TooManyRequests", "Throttling", "RequestTimeout")
_HINTS = {
    "NoSuchKey": "there is no such file",
    "SignatureDoesNotMatch": f"the secret key is wrong; check {_CREDENTIALS}",
    "InvalidAccessKeyId": f"the server does not know this access key; check {_CREDENTIALS}",
    "AccessDenied": f"these credentials may not do this; check {_CREDENTIALS}, and the bucket's policy",
    "403": f"these credentials may not do this; check {_CREDENTIALS}, and the bucket's policy",
    "ExpiredToken": "the credentials have expired; fetch new ones",
    "RequestTimeTooSkewed": "this machine's clock differs from the server's; set it right",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "PreconditionFailed": "it was replaced while it was read; start again",
}


def explain(error: Exception, *, bucket: str) -> str:
    """Say what is wrong and what to do, as the end of a sentence."""
    if isinstance(error, ClientError):
        return _explain_answer(error, bucket)
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return f"no credentials, or not all of them; set {_CREDENTIALS}"
    reason = " ".join(str(error).split())
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError):
        return f"the server cannot be reached; check AWS_ENDPOINT_URL and that it runs: {reason}"
    if isinstance(error, ValueError):
        return f"check AWS_ENDPOINT_URL, which is written http://host:port: {reason}"
    return reason


def may_pass(error: Exception) -> bool:
    """Tell whether the same request may succeed later without anybody mending anything."""
    if isinstance(error, ClientError):
        return _is_overloaded(error)
    return isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError)


def _is_overloaded(error: ClientError) -> bool:
    code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
    return status >= 500 or code in _OVERLOADED


def _explain_answer(error: ClientError, bucket: str) -> str:
    code = str(error.response["Error"]["Code"])
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket!r}; create it, or check the name and AWS_ENDPOINT_URL"
    if code in _HINTS:
        return _HINTS[code]
    reason = " ".join(str(error).split())
    if _is_overloaded(error):
        return f"the server is overloaded or broken; try again later: {reason}"
    return reason
