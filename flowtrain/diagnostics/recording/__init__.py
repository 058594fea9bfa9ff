"""Recordings: files with the state that the handlers of a callback were given, and their replay without a learner.

`record` attaches a `recorder` to a callback. At each event the recorder takes the state that the handler declares to
read, which `encoding` turns into plain data, and logs it to a `RecordingBackend`. `file` has this backend and the format
of the files. `replay` reads a file and runs a callback again, with the `content` of each event in a learner's state,
and `command` is ``flowtrain replay``.
"""

__all__: list[str] = []
