/*
 * XML-RPC interoperability peer for picket's tests: C with xmlrpc-c, its curl
 * client and its Abyss server (Debian: libxmlrpc-core-c3-dev).
 *
 *   cc -o peer peer.c -lxmlrpc_server_abyss -lxmlrpc_server -lxmlrpc_abyss \
 *      -lxmlrpc_client -lxmlrpc -lxmlrpc_util -lpthread
 *
 * (xmlrpc-c-config client abyss-server --libs adds -lcurl and so wants curl's
 * development files as well, which are not needed.)
 *
 *   peer caller URL   calls the agent at URL and prints one line "NAME RESULT"
 *                     for each call; exit status 1 if any answer was not the
 *                     expected one
 *   peer monitor      serves on a free port of 127.0.0.1, prints
 *                     "listening URL", then for each call of
 *                     cmd_store_probe_data a line
 *                     "stored TYPE TICKET CODE VALUE TIME" (or "bad ...");
 *                     ends at the end of standard input and on SIGTERM
 *
 * TYPE is "int", "i8" or "string".
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <xmlrpc-c/base.h>
#include <xmlrpc-c/client.h>
#include <xmlrpc-c/server.h>
#include <xmlrpc-c/server_abyss.h>

static void die(const char *what) { perror(what); exit(2); }

/* ---- caller ---- */

static xmlrpc_client *client;
static const char *url;
static int failed;

static int by_text(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/*
 * Appends an answer's text to out: a string as it is, an array's items and a
 * struct's sorted keys joined by blanks, a struct that stands for a fault (as
 * in what system.multicall answers) as "fault CODE".
 */
static void render(xmlrpc_env *env, xmlrpc_value *v, char *out, size_t size) {
    size_t used = strlen(out);
    xmlrpc_value *key, *item = NULL;
    const char *text = NULL, *keys[64];
    int i, n, code = 0;

    switch (xmlrpc_value_type(v)) {
    case XMLRPC_TYPE_STRING:
        xmlrpc_read_string(env, v, &text);
        if (!env->fault_occurred) snprintf(out + used, size - used, "%s", text);
        free((void *)text);
        break;
    case XMLRPC_TYPE_ARRAY:
        for (i = 0, n = xmlrpc_array_size(env, v); i < n && !env->fault_occurred; i++) {
            if (i) strncat(out, " ", size - strlen(out) - 1);
            xmlrpc_array_read_item(env, v, i, &item);
            render(env, item, out, size);
            xmlrpc_DECREF(item);
        }
        break;
    case XMLRPC_TYPE_STRUCT:
        xmlrpc_struct_find_value(env, v, "faultCode", &item);
        if (item) {
            xmlrpc_read_int(env, item, &code);
            snprintf(out + used, size - used, "fault %d", code);
            xmlrpc_DECREF(item);
            break;
        }
        n = xmlrpc_struct_size(env, v);
        for (i = 0; i < n && i < 64; i++) {
            xmlrpc_struct_read_member(env, v, i, &key, &item);
            xmlrpc_read_string(env, key, &keys[i]);
            xmlrpc_DECREF(key);
            xmlrpc_DECREF(item);
        }
        qsort(keys, n = i, sizeof keys[0], by_text);
        for (i = 0; i < n; i++) {
            used = strlen(out);
            snprintf(out + used, size - used, "%s%s", i ? " " : "", keys[i]);
            free((void *)keys[i]);
        }
        break;
    default:
        xmlrpc_env_set_fault(env, XMLRPC_TYPE_ERROR, "an answer of an unexpected type");
    }
}

/* How many of the words in text begin with cmd_; text becomes that number. */
static void count_commands(char *text, size_t size) {
    int n = 0;
    char *word;
    for (word = strtok(text, " "); word; word = strtok(NULL, " ")) n += strncmp(word, "cmd_", 4) == 0;
    snprintf(text, size, "%d", n);
}

/* Makes a call and prints its line; expected is NULL where it is not known. */
static void call(const char *name, const char *expected, const char *method, const char *format, ...) {
    xmlrpc_env env;
    xmlrpc_value *answer = NULL;
    char text[8192] = "";
    const char *note = "";
    va_list args;

    xmlrpc_env_init(&env);
    va_start(args, format);
    xmlrpc_client_call2f_va(&env, client, url, method, format, &answer, args);
    va_end(args);
    if (!env.fault_occurred) render(&env, answer, text, sizeof text);
    if (!env.fault_occurred && strcmp(name, "methods") == 0) count_commands(text, sizeof text);

    /* The library's own errors share the fault codes: it has -500 to -599. */
    if (env.fault_occurred && env.fault_code <= -500 && env.fault_code > -600) {
        snprintf(text, sizeof text, "error %d %s", env.fault_code, env.fault_string);
        failed = 1;
    } else if (env.fault_occurred) {
        snprintf(text, sizeof text, "fault %d", env.fault_code);
        if (!expected || strcmp(text, expected)) failed = 1;
    } else if (expected && strcmp(text, expected)) {
        note = "error unexpected result ";
        failed = 1;
    }
    printf("%s %s%s\n", name, note, text);
    if (answer) xmlrpc_DECREF(answer);
    xmlrpc_env_clean(&env);
}

static int caller_main(void) {
    xmlrpc_env env;
    struct xmlrpc_curl_xportparms curl = {.timeout = 10000};
    struct xmlrpc_clientparms parms = {.transport = "curl", .transportparmsP = &curl,
                                       .transportparm_size = XMLRPC_CXPSIZE(timeout)};
    const char *submit = "cmd_submit_reading";

    setenv("no_proxy", "*", 1);
    xmlrpc_env_init(&env);
    xmlrpc_client_setup_global_const(&env);
    xmlrpc_client_create(&env, 0, "peer", "1", &parms, XMLRPC_CPSIZE(transportparm_size), &client);
    if (env.fault_occurred) {
        fprintf(stderr, "peer: %s\n", env.fault_string);
        return 2;
    }
    call("healthcheck", "OK", "healthcheck", "()");
    call("array", "OK", submit, "(is(ss))", 7, "words", "one", "two three");
    call("string", "OK", submit, "(sss)", "t-8", "words", "one 'two three'");
    call("nil", "OK", submit, "(isn)", 9, "words");
    call("none", "OK", submit, "(is)", 10, "words");
    call("utf8", "OK", submit, "(is(ss))", 11, "words", "gr\xc3\xbcn", "<&>\"'");
    call("i8", "OK", submit, "(Is(idb))", (xmlrpc_int64)5000000000LL, "words", 1, 2.5, (xmlrpc_bool)1);
    call("method", "fault -32601", "no.such.method", "()");
    call("params", "fault -32602", submit, "(i)", 7);
    call("sensors", NULL, "cmd_list_sensors", "()");
    call("multicall", "OK fault -32601", "system.multicall", "(({s:s,s:()}{s:s,s:()}))",
         "methodName", "healthcheck", "params", "methodName", "no.such.method", "params");
    call("methods", NULL, "system.listMethods", "()");
    xmlrpc_client_destroy(client);
    xmlrpc_client_teardown_global_const();
    return failed;
}

/* ---- monitor ---- */

static xmlrpc_value *healthcheck(xmlrpc_env *env, xmlrpc_value *params, void *info, void *call_info) {
    (void)params, (void)info, (void)call_info;
    return xmlrpc_build_value(env, "s", "OK");
}

static xmlrpc_value *store(xmlrpc_env *env, xmlrpc_value *params, void *info, void *call_info) {
    xmlrpc_value *ticket, *code, *value, *time;
    const char *text = NULL, *when = NULL, *type = NULL, *name = NULL;
    char number[32];
    int status, taken;
    (void)info, (void)call_info;

    /* V takes values of any type; the read functions check it. */
    xmlrpc_decompose_value(env, params, "(V(VV)V)", &ticket, &code, &value, &time);
    taken = !env->fault_occurred;
    if (taken) {
        xmlrpc_int64 wide = 0;
        int narrow = 0;
        switch (xmlrpc_value_type(ticket)) {
        case XMLRPC_TYPE_INT: type = "int", xmlrpc_read_int(env, ticket, &narrow), wide = narrow; break;
        case XMLRPC_TYPE_I8: type = "i8", xmlrpc_read_i8(env, ticket, &wide); break;
        case XMLRPC_TYPE_STRING: type = "string", xmlrpc_read_string(env, ticket, &name); break;
        default: xmlrpc_env_set_fault(env, XMLRPC_TYPE_ERROR, "ticket"); break;
        }
        snprintf(number, sizeof number, "%lld", (long long)wide);
    }
    if (!env->fault_occurred) xmlrpc_read_int(env, code, &status);
    if (!env->fault_occurred) xmlrpc_read_string(env, value, &text);
    if (!env->fault_occurred) xmlrpc_read_datetime_str(env, time, &when);
    if (env->fault_occurred) {
        printf("bad %s\n", env->fault_string);
    } else {
        printf("stored %s %s %d %s %s\n", type, name ? name : number, status, text, when);
    }
    free((void *)name), free((void *)text), free((void *)when);
    if (taken) xmlrpc_DECREF(ticket), xmlrpc_DECREF(code), xmlrpc_DECREF(value), xmlrpc_DECREF(time);
    return env->fault_occurred ? NULL : xmlrpc_build_value(env, "s", "OK");
}

static void on_term(int number) { (void)number; _exit(0); }

static void *until_end_of_input(void *unused) {
    char buffer[4096];
    while (read(0, buffer, sizeof buffer) > 0) continue;
    _exit(0);
    return unused;
}

static int monitor_main(void) {
    xmlrpc_env env;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    pthread_t watcher;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    xmlrpc_server_abyss_parms parms = {.socket_bound = 1, .socket_handle = fd, .uri_path = "/xmlrpc/"};
    struct xmlrpc_method_info3 methods[] = {
        {.methodName = "healthcheck", .methodFunction = healthcheck},
        {.methodName = "cmd_store_probe_data", .methodFunction = store},
    };

    signal(SIGTERM, on_term);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, size) || listen(fd, 16) ||
        getsockname(fd, (struct sockaddr *)&address, &size))
        die("peer: socket");
    xmlrpc_env_init(&env);
    parms.registryP = xmlrpc_registry_new(&env);
    if (!env.fault_occurred) xmlrpc_registry_add_method3(&env, parms.registryP, &methods[0]);
    if (!env.fault_occurred) xmlrpc_registry_add_method3(&env, parms.registryP, &methods[1]);
    if (!env.fault_occurred) {
        if (pthread_create(&watcher, NULL, until_end_of_input, NULL)) die("peer: thread");
        printf("listening http://127.0.0.1:%d/xmlrpc/\n", ntohs(address.sin_port));
        xmlrpc_server_abyss(&env, &parms, XMLRPC_APSIZE(uri_path));
    }
    fprintf(stderr, "peer: %s\n", env.fault_occurred ? env.fault_string : "the server ended");
    return 2;
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 3 && strcmp(argv[1], "caller") == 0) {
        url = argv[2];
        return caller_main();
    }
    if (argc == 2 && strcmp(argv[1], "monitor") == 0) return monitor_main();
    fprintf(stderr, "usage: peer caller URL | peer monitor\n");
    return 2;
}
