"""The command line's commands, a module each: ``add`` describes it to the parser, ``run`` does it and returns its exit code."""

FAILED = 125  # as env(1) has it: what was asked for could not be done
