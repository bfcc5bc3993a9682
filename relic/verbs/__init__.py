"""The commands of `relic`, a file each, named as on the command line; beside the stages of `relic fit`."""
