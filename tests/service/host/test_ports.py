"""Finding the process that listens on a port, in a /proc written by hand."""

from __future__ import annotations

from service.host.ports import listener

_TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0
   1: 0100007F:1F91 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 100 0 0 10 0
"""


def test_a_descriptor_closed_in_the_meantime_hides_no_listener(tmp_path):
    """A descriptor that cannot be read is skipped; the process's other descriptors still count."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(_TABLE)
    descriptors = tmp_path / "31" / "fd"
    descriptors.mkdir(parents=True)
    for number in range(3):
        (descriptors / f"{number}").touch()  # not a link, so reading it as one fails
    (descriptors / "3").symlink_to("socket:[4711]")
    assert listener(0x1F90, tmp_path) == 31
    assert listener(0x1F91, tmp_path) is None  # connected, not listening
