"""What is wrong with a folder of pictures? `siamese check`; docs/check.md lists what is found.

findings         the kinds of findings, their severity and advice
folder_audit     names, links, classes           } each gives findings
picture_audit    one picture: decoded in full    }
duplicates       exact and near copies           }
check            all of it
quick            the cheap part, one line before training and evaluation
results          terminal, JSON, CSV; contact_sheet the picture
"""
