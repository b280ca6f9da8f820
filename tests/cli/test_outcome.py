from __future__ import annotations

import pytest

from harnessd.cli.outcome import Code, code_of, worst


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (200, "", Code.DONE),
        (202, "", Code.DONE),
        (207, "", Code.DONE),
        (400, "bad-request", Code.USAGE),
        (422, "bad-data", Code.USAGE),
        (404, "no-such-job", Code.NO_SUCH_JOB),
        (404, "no-such-route", Code.FAILED),
        *((status, "", Code.REFUSED) for status in (401, 403, 405, 409, 413, 415, 429)),
        *((status, "", Code.FAILED) for status in (500, 503, 504)),
    ],
)
def test_every_status_has_its_exit_code(status: int, kind: str, code: Code) -> None:
    assert code_of(status, kind) is code


def test_several_outcomes_have_the_code_that_the_failed_ones_share() -> None:
    assert worst([]) is Code.DONE
    assert worst([Code.DONE, Code.DONE]) is Code.DONE
    assert worst([Code.DONE, Code.REFUSED, Code.REFUSED]) is Code.REFUSED
    assert worst([Code.NO_SUCH_JOB, Code.REFUSED]) is Code.FAILED
