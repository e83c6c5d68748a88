"""What of a followed job's output is shown: all but the stacks that Ray's raylets print when they are given up.

Ray prints the last lines of a lost node's raylet into the output of every job that is connected, the frames of its C++
stack among them; the line above them says what happened.
"""

from __future__ import annotations

import re
import sys

_COLOUR = r"(?:\x1b\[\d*m)*"
_FRAME = r"\S+\([^)]*\+0x[0-9a-f]+\) \[0x[0-9a-f]+\].*"
_TITLE = r"\*\*\* StackTrace Information \*\*\*(?: \[repeated .*)?"
# The second is what Ray quotes of a log, four spaces in.
_OF_A_RAYLET = re.compile(
    rf"{_COLOUR}\(raylet[^)]*\){_COLOUR} *(?:{_FRAME}|{_TITLE}|){_COLOUR}|{_COLOUR} {{4}}(?:{_FRAME}|{_TITLE})"
)


class Screen:
    """Writes whole lines to standard error.

    Attributes:
        num_left_out: Number of lines that were not shown.
    """

    def __init__(self) -> None:
        self.num_left_out = 0
        self._begun = ""

    def write(self, text: str) -> None:
        """Show the lines that are whole by now; `text` may begin and end within one."""
        *lines, self._begun = (self._begun + text).split("\n")
        shown = [line for line in lines if not _OF_A_RAYLET.fullmatch(line.rstrip("\r"))]
        self.num_left_out += len(lines) - len(shown)
        if shown:
            sys.stderr.write("\n".join(shown) + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Show what no line's end followed."""
        sys.stderr.write(self._begun)
        sys.stderr.flush()
        self._begun = ""
