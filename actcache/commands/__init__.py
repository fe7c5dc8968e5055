"""The commands of a cache in the terminal: harvest, info, verify, repair, relabel, import-cache and export-cache.

In come the words of a command line.
Out go calls of the rooms below, lines on stderr, JSON on stdout, and an exit code.
Nothing here may compute what a room below computes, or import torch before a command runs.

Public:
    harvest.harvest: the command harvest
    integrity.info: the command info
    integrity.verify: the command verify
    integrity.repair: the command repair
    integrity.relabel: the command relabel
    exchange.import_cache: the command import-cache
    exchange.export_cache: the command export-cache
    lines.cache_facts: a cache as JSON values
    lines.cache_lines: a cache as lines for a person
    named_sources.refuse_unnamed: models and datasets the user never named
    remembered.ModelOfCache: the model that a cache remembers
    terminal.Commands: turns errors into exit codes
    terminal.say: prints a line for a person
    terminal.with_local_paths: refuses an address among a command's paths
"""
