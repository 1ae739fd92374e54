"""A pseudo-terminal of a given width for a command, and what a person sees on it while the command runs and at its end."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from dataclasses import dataclass, field
from pathlib import Path

_PIECE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b[^\[]|[\r\n\x08]|[^\x1b\r\n\x08]")


@dataclass
class Screen:
    """A terminal without an end below: text wraps at its width, and a few escape codes move the cursor."""

    width: int
    rows: list[str] = field(default_factory=lambda: [""])
    row: int = 0
    column: int = 0

    def write(self, text: str) -> None:
        for piece in _PIECE.finditer(text):
            if piece[2] is not None:
                self._obey(piece[1], piece[2])
            elif piece[0] == "\r":
                self.column = 0
            elif piece[0] == "\n":
                self._go_to(self.row + 1)
            elif piece[0].isprintable():
                self._put(piece[0])

    def lines(self) -> list[str]:
        return [row.rstrip() for row in self.rows]

    def _obey(self, number: str, code: str) -> None:
        if code == "A":
            self.row = max(0, self.row - int(number or 1))
        elif code == "K":
            self.rows[self.row] = "" if number == "2" else self.rows[self.row][: self.column]
        else:
            assert code in "mhl", f"an escape code that this terminal does not know: {number}{code}"

    def _put(self, letter: str) -> None:
        if self.column == self.width:
            self.column = 0
            self._go_to(self.row + 1)
        row = self.rows[self.row].ljust(self.column)
        self.rows[self.row] = row[: self.column] + letter + row[self.column + 1 :]
        self.column += 1

    def _go_to(self, row: int) -> None:
        self.row = row
        self.rows += [""] * (row + 1 - len(self.rows))


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What was seen of a command: its screen after each piece of output, and its exit code."""

    screens: list[list[str]]
    code: int

    @property
    def last(self) -> list[str]:
        return self.screens[-1]


def run_on_terminal(command: list[str], *, width: int, folder: Path, **environment: str) -> Shown:
    """Run a command whose stdout and stderr are a terminal of that many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    variables |= {"TERM": "xterm-256color"} | environment
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=variables)
    os.close(theirs)
    screen, screens, undecoded = Screen(width), list[list[str]](), b""
    while data := _read(ours):
        undecoded += data
        text = undecoded.decode(errors="ignore") if len(undecoded) > 4 else ""
        if text.encode() == undecoded and not re.search(r"\x1b(\[[0-9;?]*)?\Z", text):
            screen.write(text)
            screens.append(screen.lines())
            undecoded = b""
    os.close(ours)
    return Shown(screens=screens or [[""]], code=process.wait(60))


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody has the other end any more
        return b""
