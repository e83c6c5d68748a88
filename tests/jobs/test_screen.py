"""What of a followed job's output is shown, by what Ray 2.60 printed where a host was cut off."""

import pytest

from jobs.submission.screen import Screen

RAYLET = "/venv/lib/python3.11/site-packages/ray/core/src/ray/raylet/raylet"
OURS = [
    "(raylet) The node with node id: bb6a8b2f and address: 10.77.0.11 has been marked dead",
    "\t(2) raylet has lagging heartbeats due to slow network or busy workload.",
    "    [2026-11-27 04:10:08,893 C 16345 16345] (raylet) node_manager.cc:971: [Timeout] Exiting because",
    "(raylet, ip=10.77.0.11) [2026-11-27 04:17:14,221 C 18051 18051] (raylet) node_manager.cc:971: [Timeout] Exiting",
    "\x1b[36m(RayTrainWorker pid=6351, ip=10.77.0.12)\x1b[0m step-00000135 written in 0.3 s",
    "(RayTrainWorker pid=6351) /venv/ray/_raylet.so(+0x65fcfa) [0x7f06c9a5fcfa] ray::core::CoreWorker::RunTask()",
    "(RayTrainWorker pid=6351) *** StackTrace Information ***",
    "*** StackTrace Information ***",
    "/venv/torch/lib/libc10.so(+0x2724a) [0x7fd94924524a]",
    "",
    '{"step": 3}',
]
RAYS = [
    f"(raylet, ip=10.77.0.11) {RAYLET}(+0xff770a) [0x5642ae68770a] ray::operator<<()",
    f"\x1b[33m(raylet, ip=10.77.0.11)\x1b[0m {RAYLET}(+0x8bbdcb) [0x5642adf4bdcb] std::_Function_handler<>::_M_invoke()"
    " [repeated 3x across cluster]",
    "(raylet, ip=10.77.0.11) /lib/x86_64-linux-gnu/libc.so.6(__libc_start_main+0x85) [0x7f852f645305] main",
    "(raylet, ip=10.77.0.11) *** StackTrace Information ***",
    "(raylet, ip=10.77.0.11) *** StackTrace Information *** [repeated 2x across cluster] (Ray deduplicates logs)",
    "(raylet, ip=10.77.0.11) ",
    "\x1b[33m(raylet, ip=10.77.0.11)\x1b[0m ",
    f"    {RAYLET}(+0x263cb7) [0x55941ec85cb7]",
    "    *** StackTrace Information ***",
]


@pytest.mark.parametrize("line", OURS)
def test_what_says_something_is_shown(line, capsys):
    Screen().write(line + "\n")
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("line", RAYS)
def test_frames_of_a_raylet_are_left_out_and_counted(line, capsys):
    screen = Screen()
    screen.write(line + "\n")
    screen.close()
    assert screen.num_left_out == 1
    assert capsys.readouterr().err == ""


def test_it_does_not_matter_where_the_pieces_end(capsys):
    text = "\n".join(line for pair in zip(OURS, RAYS, strict=False) for line in pair) + "\nhalf a line"
    for size in (1, 7, 100, len(text)):
        screen = Screen()
        for begin in range(0, len(text), size):
            screen.write(text[begin : begin + size])
        screen.close()
        assert screen.num_left_out == len(RAYS)
        assert capsys.readouterr().err == "\n".join([*OURS[: len(RAYS)], "half a line"])
