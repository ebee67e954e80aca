"""What is typed in a shell: ``kd-train`` and the rest, and the files of ``tools`` in a checkout.

Each command has ``run``, which reads ``sys.argv`` and ends the process, and ``parse_arguments``
and ``main``, which do neither. Flags come first, config overrides (KEY VALUE ...) last, and
``--output`` names what is written.
"""
