"""Recordings: files with the state that the handlers of a callback were given, and their replay without a learner.

`record`, in `recorder`, attaches an `EventRecording` to a callback. At each event it takes the state that the handler
declares to read, which `encoding` turns into data, and logs it to a `RecordingBackend`. `file` has this backend and the
format of the files. `replay` reads a file and runs a callback again: `decoding` makes the values anew, and `shown` has
the view in which handlers see them. `command` is ``flowtrain replay``.
"""

__all__: list[str] = []
