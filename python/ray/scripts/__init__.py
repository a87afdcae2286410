"""The command `ray`: a module for each sub-command, loaded when it is asked for."""
