"""From words and files to a configuration: the command line, groups of conf/, settings files. The one home of Hydra."""
