#!/usr/bin/perl
# XML-RPC interoperability peer for picket's tests: Perl's RPC::XML
# (Debian: librpc-xml-perl).
#
#   perl peer.pl caller URL   calls the agent at URL and prints one line
#                             "NAME RESULT" for each call; exit status 1 if any
#                             answer was not the expected one
#   perl peer.pl monitor      serves on a free port of 127.0.0.1, prints
#                             "listening URL", then for each call of
#                             cmd_store_probe_data a line
#                             "stored TYPE TICKET CODE VALUE TIME" (or
#                             "bad ..."); ends at the end of standard input and
#                             on SIGTERM
#
# TYPE is "int", "i8" or "string". The library declares its documents to be
# us-ascii unless told otherwise; this is left so on purpose, but for the one
# call that sends more than ASCII.
use strict;
use warnings;
use utf8;
use IO::Select;
use POSIX ();
use RPC::XML;
use RPC::XML::Client;
use RPC::XML::Server;

binmode STDOUT, ':encoding(UTF-8)';
$| = 1;
$RPC::XML::ALLOW_NIL = 1;

sub text { return RPC::XML::string->new($_[0]) }
sub int4 { return RPC::XML::int->new($_[0]) }
sub list { return RPC::XML::array->new(@_) }

sub caller_main {
    my ($url) = @_;
    my $failed = 0;
    my $client = RPC::XML::Client->new($url, useragent => [timeout => 10]);

    # Makes a call, prints its line. $expected is undef where the result is not
    # known beforehand; $show turns the answer's plain value into the result.
    my $call = sub {
        my ($name, $expected, $show, $method, @args) = @_;
        my $result = eval {
            my $answer = $client->send_request($method, @args);
            die "$answer\n" if !ref $answer;
            $answer->is_fault ? 'fault ' . $answer->code : $show->($answer);
        };
        if (!defined $result) {
            $result = 'error ' . ($@ || 'no result');
            $result = join ' ', split ' ', $result;
            $failed = 1;
        }
        elsif (defined $expected ? $result ne $expected : $result =~ /^fault /) {
            $result = "error unexpected result $result" if $result !~ /^fault /;
            $failed = 1;
        }
        print "$name $result\n";
    };
    my $string = sub { $_[0]->type eq 'string' ? $_[0]->value : die 'a ' . $_[0]->type . "\n" };
    my $submit = sub { $call->($_[0], 'OK', $string, 'cmd_submit_reading', @_[1 .. $#_]) };
    my $member = sub { ref $_[0] eq 'HASH' ? "fault $_[0]{faultCode}" : $_[0][0] };

    $call->('healthcheck', 'OK', $string, 'healthcheck');
    $submit->('array', int4(7), text('words'), list(text('one'), text('two three')));
    $submit->('string', text('t-8'), text('words'), text("one 'two three'"));
    $submit->('nil', int4(9), text('words'), RPC::XML::nil->new);
    $submit->('none', int4(10), text('words'));
    {
        local $RPC::XML::ENCODING = 'UTF-8';
        $submit->('utf8', int4(11), text('words'), list(text('grün'), text(q{<&>"'})));
    }
    $submit->('i8', RPC::XML::i8->new('5000000000'), text('words'),
        list(int4(1), RPC::XML::double->new(2.5), RPC::XML::boolean->new(1)));
    $call->('method', 'fault -32601', $string, 'no.such.method');
    $call->('params', 'fault -32602', $string, 'cmd_submit_reading', int4(7));
    $call->('sensors', undef, sub { join ' ', sort keys %{ $_[0]->value } }, 'cmd_list_sensors');
    $call->('multicall', 'OK fault -32601', sub { join ' ', map { $member->($_) } @{ $_[0]->value } },
        'system.multicall',
        list(map { RPC::XML::struct->new(methodName => text($_), params => list()) }
                qw(healthcheck no.such.method)));
    $call->('methods', undef, sub { scalar grep { /^cmd_/ } @{ $_[0]->value } }, 'system.listMethods');
    return $failed;
}

# The library hands plain values to a method's code; this keeps the request's
# typed objects for it.
my @typed;
package PeerServer {
    our @ISA = ('RPC::XML::Server');

    sub dispatch {
        my ($self, $request) = @_;
        @typed = ref $request ? @{ $request->args } : ();
        return $self->SUPER::dispatch($request);
    }
}

sub store {
    my ($ticket, $probe, $time, @more) = @typed;
    my $is = sub { ref $_[0] && $_[0]->type =~ /^(?:$_[1])$/ };
    my ($code, $value, @rest) = $is->($probe, 'array') ? @$probe : ();
    my ($wrong) = grep { !$_->[1] } (
        ['ticket', $is->($ticket, 'int|i4|i8|string')],
        ['code',   $is->($code,   'int|i4')],
        ['value',  $is->($value,  'string')],
        ['time',   $is->($time,   'dateTime\.iso8601')],
        ['number of values', !@rest && !@more],
    );
    if ($wrong) {
        print "bad $wrong->[0]\n";
        return RPC::XML::fault->new(400, "bad $wrong->[0]");
    }
    (my $type = $ticket->type) =~ s/^i4$/int/;
    print join(' ', 'stored', $type, map { $_->value } $ticket, $code, $value, $time), "\n";
    return text('OK');
}

sub monitor_main {
    local $SIG{TERM} = sub { POSIX::_exit(0) };
    my $server = PeerServer->new(host => '127.0.0.1', no_default => 1);
    die "$server\n" if !ref $server;
    $server->response->header(Connection => 'close');  # it serves one at a time
    my %code = (healthcheck => sub { text('OK') }, cmd_store_probe_data => \&store);
    for my $name (sort keys %code) {
        my $added = $server->add_method({ type => 'function', name => $name, code => $code{$name} });
        die "$added\n" if !ref $added;
    }

    # A child waits for the end of standard input, or of this process.
    pipe my $alive_in, my $alive_out or die "pipe: $!\n";
    defined(my $child = fork) or die "fork: $!\n";
    if (!$child) {
        my $parent = getppid;
        close $_ for $alive_out, $server->{__daemon}, *STDOUT, *STDERR;
        my $select = IO::Select->new(\*STDIN, $alive_in);
        while (my @ready = $select->can_read) {
            last if grep { $_ == $alive_in || !sysread STDIN, my $buffer, 4096 } @ready;
        }
        kill TERM => $parent if getppid == $parent;
        POSIX::_exit(0);
    }
    close $alive_in;
    print 'listening http://127.0.0.1:', $server->port, "/xmlrpc/\n";
    $server->server_loop;
    return 0;
}

exit caller_main($ARGV[1]) if @ARGV == 2 && $ARGV[0] eq 'caller';
exit monitor_main() if @ARGV == 1 && $ARGV[0] eq 'monitor';
die "usage: peer.pl caller URL | peer.pl monitor\n";
