# Prints each value of an INI file, as Python's own parser reads it.
import sys
try:
    import ConfigParser as configparser
    c = configparser.SafeConfigParser()
except ImportError:
    import configparser
    c = configparser.ConfigParser(strict=False, inline_comment_prefixes=(';', '#'))
c.read(sys.argv[1])
lines = []
for s in ['DEFAULT'] + c.sections():
    for o in (c.defaults() if s == 'DEFAULT' else c._sections[s]):
        if o != '__name__':
            try:
                v = c.get(s, o).replace('\n', '\\n')
            except configparser.Error:
                v = 'ERROR'
            lines.append('%s|%s|%s' % (s, o, v))
for line in sorted(lines):
    print(line)
