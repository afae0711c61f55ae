"""What the command line offers beside LightningCLI's own commands, one file each."""
