"""Training runs of the papers and the main job. Each script: `python -m experiments.<name> --help`."""
