# Prints in what Python's own parser differs: it reads a file, and gets what picket read in it.
import json
import sys
try:
    import ConfigParser as configparser
    c = configparser.SafeConfigParser()
except ImportError:
    import configparser
    c = configparser.ConfigParser(strict=False, inline_comment_prefixes=(';', '#'))
c.read(sys.argv[1])
options = {s: set(c._sections[s]) - {'__name__'} for s in c.sections()}
options['DEFAULT'] = set(c.defaults())
for line in sys.argv[2].splitlines():
    if line.startswith('['):
        section = line[1:-1]
        continue
    option, equals, value = line.partition(' = ')
    want = json.loads(value) if equals else 'ERROR'
    option = option.split(': ')[0]
    options[section].discard(option)
    try:
        got = c.get(section, option)
    except configparser.Error:
        got = 'ERROR'
    if want not in (got, getattr(got, 'decode', lambda coding: got)('utf-8')):
        print('[%s] %s: got %r; Python reads %r' % (section, option, want, got))
for section in options:
    for option in options[section]:
        print('[%s] %s is missing' % (section, option))
