// What the machine knows: the program, its warps, and what is in flight.
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LANES 32
#define ALL 0xffffffffu
#define SHARED_BASE 1024
#define LONGEST 2000000000ull // instructions of one warp

enum {
#define ONE(name, value) name,
#define TWO(name, value) name,
#define THREE(name, value) name,
#include "lanes.h"
#undef ONE
#undef TWO
#undef THREE
#define WARP(name) name,
#include "warps.h"
#undef WARP
    KINDS
};

typedef struct {
    int32_t kind, guard, negated, first, count, results, line;
} Instruction;

typedef struct {
    uint64_t source;
    uint32_t target, bytes, real, group;
} Copy;

typedef struct {
    uint32_t instruction, group;
    uint64_t left, right; // descriptors, which it takes along
    int keep;
} Product; // or a move of what one will give, as compilers place them where loops close

typedef struct {
    Copy *copies;
    Product *products;
    uint32_t copy_count, copy_room, copy_group, product_count, product_room, product_group;
} Pending;

typedef struct {
    uint64_t *registers;
    int32_t pc[LANES];
    uint32_t live;
    int waiting, number;
    uint64_t steps;
    Pending pending;
    uint8_t *flight;
} Warp;

typedef struct {
    const Instruction *code;
    const int32_t *operands;
    const uint64_t *ranges;
    int32_t range_count, shared_bytes, timing;
    uint32_t chance;
    int32_t registers;
    uint8_t *shared;
    uint64_t *counts;
    char *message;
    jmp_buf failed;
    const Instruction *current;
} Machine;

static void fail(Machine *m, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int used = snprintf(m->message, 256, "line %d: ", m->current ? m->current->line : 0);
    vsnprintf(m->message + used, 256 - used, format, arguments);
    va_end(arguments);
    longjmp(m->failed, 1);
}

static uint32_t next_random(uint32_t *state) { return *state = *state * 1664525u + 1013904223u; }

enum { EARLY, LATE, MIXED };

static int is_late(Machine *m) { return m->timing == MIXED ? next_random(&m->chance) >> 16 & 1 : m->timing == LATE; }

static void *grown(void *items, uint32_t count, uint32_t *room, size_t size) {
    if (count < *room) return items;
    *room = *room ? 2 * *room : 256;
    return realloc(items, *room * size);
}
