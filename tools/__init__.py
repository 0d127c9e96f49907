"""The command line: jobs that fill a cache, and commands that look at one."""
