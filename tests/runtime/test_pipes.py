from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest

from lightning_pipebd.runtime.pipes import PipeReader, PipeWriter


def make_pipe() -> tuple[PipeWriter, PipeReader]:
    writer = PipeWriter()
    reader = PipeReader(os.getpid(), writer.reading_end)
    writer.let_go()
    return writer, reader


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class TestPipe:
    def test_bytes_arrive_in_order_in_whatever_parts_they_are_read(self) -> None:
        writer, reader = make_pipe()
        writer.write(b"abc")
        writer.write(b"defg")
        assert [reader.read(2), reader.read(4), reader.read(1), reader.read(0)] == [b"ab", b"cdef", b"g", b""]

    def test_what_is_there_is_read_at_once(self) -> None:
        writer, reader = make_pipe()
        writer.write(b"abc")
        assert [reader.read_some(2), reader.read_some(256)] == [b"ab", b"c"]
        del writer
        gc.collect()
        with pytest.raises(ConnectionError, match="the other end has closed it"):
            reader.read_some(1)

    def test_more_than_the_pipe_holds_is_written_while_it_is_read(self) -> None:
        writer, reader = make_pipe()
        data = bytes(range(256)) * 4096
        thread = threading.Thread(target=writer.write, args=(data,))
        thread.start()
        assert reader.read(len(data)) == data
        thread.join()

    def test_reader_is_told_that_the_writer_has_ended_after_what_it_wrote(self) -> None:
        writer, reader = make_pipe()
        writer.write(b"last")
        del writer
        gc.collect()
        assert reader.read(4) == b"last"
        with pytest.raises(ConnectionError, match="the other end has closed it"):
            reader.read(1)

    def test_writer_is_told_that_the_reader_has_ended(self) -> None:
        writer, reader = make_pipe()
        del reader
        gc.collect()
        with pytest.raises(ConnectionError, match="Broken pipe"):
            writer.write(b"x")

    def test_reader_waits_no_longer_than_it_was_told(self) -> None:
        _writer, reader = make_pipe()
        with pytest.raises(TimeoutError, match=r"nothing came for 0\.01 s"):
            reader.read(1, timeout_s=0.01)

    def test_process_that_has_ended_has_no_pipe(self) -> None:
        with pytest.raises(OSError, match="No such file"):
            PipeReader(2**22 + 1, 3)

    def test_pipe_leaves_no_file_open(self) -> None:
        before = num_open_files()
        writer, reader = make_pipe()
        assert num_open_files() == before + 2
        del writer, reader
        gc.collect()
        assert num_open_files() == before
        writer = PipeWriter()
        del writer
        gc.collect()
        assert num_open_files() == before
