"""The command `fastloss score`: the loss of files that are larger than memory, of each image and in total."""
