"""What a program is told: command lines, recipes and saved tables become typed settings, mistakes become one line."""
