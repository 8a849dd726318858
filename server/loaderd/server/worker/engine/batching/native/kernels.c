/* What a step computes between its matrix products, in one pass over memory each.
 *
 * torch has an operator for each of these computations' parts; at a few rows each costs more than
 * its arithmetic. Compiled by compiler.py for the CPU that it runs on. Numbers are 32-bit floats
 * inside; tensors may have 16 bits. All tensors are contiguous unless a stride is given.
 *
 * Threads are those of the OpenMP runtime that torch has loaded, so that no second team of threads
 * wants the same cores: kernels.py gives its entry point to use_threads().
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, FLOAT16 };

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 128          /* tokens whose scores are computed together */
#define LEAST_SPLIT 256    /* tokens that are worth a thread's attention */
#define ALONE 8192         /* numbers that one thread computes sooner than several share them */

typedef void (*Parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

static Parallel run_parallel;

void use_threads(void *parallel) { run_parallel = (Parallel)parallel; }

/* Numbers of 16 bits. */

INLINE float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float number;
    memcpy(&number, &wide, 4);
    return number;
}

INLINE uint16_t to_bfloat16(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint32_t quiet = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

/* Not every compiler has a type for these on every CPU. */
INLINE float from_float16(uint16_t bits) {
    uint32_t wide = (uint32_t)(bits & 0x7fff) << 13;
    float number;
    memcpy(&number, &wide, 4);
    number *= 0x1p112f; /* between the middles of the exponents */
    memcpy(&wide, &number, 4);
    wide |= (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    wide |= (uint32_t)(bits & 0x8000) << 16;
    memcpy(&number, &wide, 4);
    return number;
}

INLINE uint16_t to_float16(float number) {
    uint32_t bits, small;
    memcpy(&bits, &number, 4);
    uint32_t size = bits & 0x7fffffff;
    uint32_t rounded = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    float sum = __builtin_fabsf(number) + 0.5f; /* rounds to what the smallest exponent has */
    memcpy(&small, &sum, 4);
    rounded = size < 113 << 23 ? small - (126 << 23) : rounded;
    rounded = size >= 0x477ff000 ? 0x7c00 : rounded; /* 65520 */
    rounded = size > 0x7f800000 ? 0x7e00 : rounded;
    return (uint16_t)(rounded | ((bits >> 16) & 0x8000));
}

INLINE void widen(const void *from, int type, long first, long count, float *to) {
    if (type == FLOAT32) {
        memcpy(to, (const float *)from + first, count * sizeof(float));
    } else if (type == BFLOAT16) {
        const uint16_t *numbers = (const uint16_t *)from + first;
        for (long i = 0; i < count; i++) to[i] = from_bfloat16(numbers[i]);
    } else {
        const uint16_t *numbers = (const uint16_t *)from + first;
        for (long i = 0; i < count; i++) to[i] = from_float16(numbers[i]);
    }
}

INLINE void narrow(const float *from, long count, void *to, int type, long first) {
    if (type == FLOAT32) {
        memcpy((float *)to + first, from, count * sizeof(float));
    } else if (type == BFLOAT16) {
        uint16_t *numbers = (uint16_t *)to + first;
        for (long i = 0; i < count; i++) numbers[i] = to_bfloat16(from[i]);
    } else {
        uint16_t *numbers = (uint16_t *)to + first;
        for (long i = 0; i < count; i++) numbers[i] = to_float16(from[i]);
    }
}

/* e to a number that is not positive: two factors, 2 to a whole number and a polynomial. */
INLINE float exponential(float x) {
    float bounded = x > -87.0f ? x : -87.0f; /* a number even where x is none */
    float whole = __builtin_rintf(bounded * 1.44269504088896341f);
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : sum * power;
}

/* Rows that threads take one by one. */

typedef struct {
    void (*row)(const void *arguments, long row);
    const void *arguments;
    long rows, next;
} Rows;

static void take_rows(void *data) {
    Rows *work = data;
    for (;;) {
        long row = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (row >= work->rows) return;
        work->row(work->arguments, row);
    }
}

INLINE void each_row(
    void (*row)(const void *, long), const void *arguments, long rows, long numbers, int threads
) {
    Rows work = {row, arguments, rows, 0};
    if (threads < 2 || rows < 2 || numbers < ALONE)
        take_rows(&work);
    else
        run_parallel(take_rows, &work, threads, 0); /* fewer would end the others */
}

/* hidden += delta; normed = hidden / root of its mean square * weight */

typedef struct {
    float *hidden;
    const void *delta; /* or NULL */
    const float *weight;
    void *normed;
    float epsilon;
    int size, delta_type, normed_type;
} Norm;

static void norm_row(const void *data, long row) {
    const Norm *n = data;
    float *hidden = n->hidden + row * n->size;
    float scratch[1024];
    float squares = 0;
    for (int begin = 0; begin < n->size; begin += 1024) {
        int count = n->size - begin < 1024 ? n->size - begin : 1024;
        float *part = hidden + begin;
        if (n->delta) {
            widen(n->delta, n->delta_type, row * n->size + begin, count, scratch);
            for (int i = 0; i < count; i++) part[i] += scratch[i];
        }
#pragma omp simd reduction(+ : squares)
        for (int i = 0; i < count; i++) squares += part[i] * part[i];
    }
    float scale = 1.0f / __builtin_sqrtf(squares / n->size + n->epsilon);
    for (int begin = 0; begin < n->size; begin += 1024) {
        int count = n->size - begin < 1024 ? n->size - begin : 1024;
        for (int i = 0; i < count; i++)
            scratch[i] = hidden[begin + i] * scale * n->weight[begin + i];
        narrow(scratch, count, n->normed, n->normed_type, row * n->size + begin);
    }
}

void add_and_norm(
    float *hidden, const void *delta, const float *weight, void *normed, long rows, int size,
    float epsilon, int delta_type, int normed_type, int threads
) {
    Norm norm = {hidden, delta, weight, normed, epsilon, size, delta_type, normed_type};
    each_row(norm_row, &norm, rows, rows * size, threads);
}

/* silu(gate) * up, of rows [gate, up] */

typedef struct {
    const void *gate_and_up;
    void *product;
    int size, type, product_type;
} Gate;

static void gate_row(const void *data, long row) {
    const Gate *g = data;
    float gate[512], up[512];
    for (int begin = 0; begin < g->size; begin += 512) {
        int count = g->size - begin < 512 ? g->size - begin : 512;
        long first = row * 2 * g->size + begin;
        widen(g->gate_and_up, g->type, first, count, gate);
        widen(g->gate_and_up, g->type, first + g->size, count, up);
        for (int i = 0; i < count; i++) {
            float size = gate[i] < 0 ? gate[i] : -gate[i];
            float power = exponential(size);
            float sigmoid = (gate[i] < 0 ? power : 1.0f) / (1.0f + power);
            gate[i] = gate[i] * sigmoid * up[i];
        }
        narrow(gate, count, g->product, g->product_type, row * g->size + begin);
    }
}

void silu_and_multiply(
    const void *gate_and_up, void *product, long rows, int size, int type, int product_type,
    int threads
) {
    Gate gate = {gate_and_up, product, size, type, product_type};
    each_row(gate_row, &gate, rows, rows * size * 2, threads);
}

/* Rotary embedding of the queries and keys of rows [queries, keys, values], by halves. */

typedef struct {
    const void *projected;
    const float *cosines, *sines; /* [rows, dimensions / 2] */
    const float *query_norm, *key_norm; /* [dimensions], or NULL */
    void *turned; /* [rows, heads + 2 * key heads, dimensions] */
    float epsilon;
    int heads, key_heads, dimensions, type, turned_type;
} Turn;

static void turn_row(const void *data, long row) {
    const Turn *t = data;
    int d = t->dimensions, half = d / 2, all = t->heads + 2 * t->key_heads;
    const float *cosines = t->cosines + row * half, *sines = t->sines + row * half;
    float head[d], turned[d];
    for (int h = 0; h < all; h++) {
        long first = (row * all + h) * d;
        widen(t->projected, t->type, first, d, head);
        if (h < t->heads + t->key_heads) {
            const float *norm = h < t->heads ? t->query_norm : t->key_norm;
            if (norm) {
                float squares = 0;
#pragma omp simd reduction(+ : squares)
                for (int i = 0; i < d; i++) squares += head[i] * head[i];
                float scale = 1.0f / __builtin_sqrtf(squares / d + t->epsilon);
                for (int i = 0; i < d; i++) head[i] *= scale * norm[i];
            }
            for (int i = 0; i < half; i++) {
                turned[i] = head[i] * cosines[i] - head[half + i] * sines[i];
                turned[half + i] = head[half + i] * cosines[i] + head[i] * sines[i];
            }
            narrow(turned, d, t->turned, t->turned_type, first);
        } else {
            narrow(head, d, t->turned, t->turned_type, first);
        }
    }
}

void turn(
    const void *projected, const float *cosines, const float *sines, const float *query_norm,
    const float *key_norm, void *turned, long rows, int heads, int key_heads, int dimensions,
    float epsilon, int type, int turned_type, int threads
) {
    Turn work = {projected, cosines, sines, query_norm, key_norm, turned, epsilon, heads,
                 key_heads, dimensions, type, turned_type};
    each_row(turn_row, &work, rows, rows * (heads + 2 * key_heads) * dimensions, threads);
}

/* Attention of one token in each of some rows, over keys and values in slots.
 *
 * Softmax in one pass over the keys, block by block: Milakov and Gimelshein, "Online normalizer
 * calculation for softmax", 2018. Long rows are divided among threads, whose parts are put
 * together afterwards: Dao et al., "Flash-Decoding for long-context inference", 2023.
 */

typedef struct {
    long row, begin, end;
    int head;
    float *part; /* of each query head: its sum, the sum of its weights, its largest score */
} Unit;

typedef struct {
    const void *queries;       /* [rows, heads, dimensions], with strides */
    const void *keys, *values; /* [slots, key heads, tokens, dimensions] */
    void *output;              /* [rows, heads, dimensions] */
    const Unit *units;
    const int64_t *slots;
    long query_stride, query_head_stride, slot_stride, head_stride;
    float scaling;
    int key_heads, shared, dimensions, type, is_split;
} Attend;

INLINE void attend_unit(const Attend *a, const Unit *unit, int d, int type) {
    int shared = a->shared;
    float queries[shared * d], sums[shared * d], scores[shared][BLOCK];
    float largest[shared], weights[shared];
    float one[d];
    long head = a->slots[unit->row] * a->slot_stride + unit->head * a->head_stride;
    for (int g = 0; g < shared; g++) {
        long query = unit->head * shared + g;
        query = unit->row * a->query_stride + query * a->query_head_stride;
        widen(a->queries, type, query, d, queries + g * d);
    }
    for (int i = 0; i < shared * d; i++) queries[i] *= a->scaling, sums[i] = 0;
    for (int g = 0; g < shared; g++) largest[g] = -1e30f, weights[g] = 0;
    for (long begin = unit->begin; begin < unit->end; begin += BLOCK) {
        int count = unit->end - begin < BLOCK ? unit->end - begin : BLOCK;
        for (int t = 0; t < count; t++) {
            widen(a->keys, type, head + (begin + t) * d, d, one);
            for (int g = 0; g < shared; g++) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int i = 0; i < d; i++) sum += queries[g * d + i] * one[i];
                scores[g][t] = sum;
            }
        }
        for (int g = 0; g < shared; g++) {
            float top = largest[g];
#pragma omp simd reduction(max : top)
            for (int t = 0; t < count; t++) top = scores[g][t] > top ? scores[g][t] : top;
            float before = exponential(largest[g] - top), sum = 0;
            largest[g] = top;
#pragma omp simd reduction(+ : sum)
            for (int t = 0; t < count; t++) {
                scores[g][t] = exponential(scores[g][t] - top);
                sum += scores[g][t];
            }
            weights[g] = weights[g] * before + sum;
            for (int i = 0; i < d; i++) sums[g * d + i] *= before;
        }
        for (int t = 0; t < count; t++) {
            widen(a->values, type, head + (begin + t) * d, d, one);
            for (int g = 0; g < shared; g++) {
                float weight = scores[g][t];
                for (int i = 0; i < d; i++) sums[g * d + i] += weight * one[i];
            }
        }
    }
    if (a->is_split) {
        memcpy(unit->part, sums, sizeof sums);
        memcpy(unit->part + shared * d, weights, sizeof weights);
        memcpy(unit->part + shared * (d + 1), largest, sizeof largest);
        return;
    }
    for (int g = 0; g < shared; g++) {
        float scale = 1.0f / weights[g];
        for (int i = 0; i < d; i++) sums[g * d + i] *= scale;
    }
    long first = (unit->row * a->key_heads + unit->head) * shared * d;
    narrow(sums, shared * d, a->output, a->type, first);
}

static void attend_row(const void *data, long number) {
    const Attend *a = data;
    const Unit *unit = a->units + number;
    /* Compiled for the usual sizes each. */
    if (a->dimensions == 64 && a->type == BFLOAT16) attend_unit(a, unit, 64, BFLOAT16);
    else if (a->dimensions == 128 && a->type == BFLOAT16) attend_unit(a, unit, 128, BFLOAT16);
    else if (a->dimensions == 64 && a->type == FLOAT32) attend_unit(a, unit, 64, FLOAT32);
    else if (a->dimensions == 128 && a->type == FLOAT32) attend_unit(a, unit, 128, FLOAT32);
    else if (a->type == BFLOAT16) attend_unit(a, unit, a->dimensions, BFLOAT16);
    else if (a->type == FLOAT32) attend_unit(a, unit, a->dimensions, FLOAT32);
    else attend_unit(a, unit, a->dimensions, FLOAT16);
}

/* Puts the parts of one row's head together. */
static void join(const Attend *a, const Unit *units, int count) {
    int shared = a->shared, d = a->dimensions;
    float sums[shared * d];
    for (int g = 0; g < shared; g++) {
        float top = -1e30f, weights = 0;
        for (int u = 0; u < count; u++) {
            float largest = units[u].part[shared * (d + 1) + g];
            top = largest > top ? largest : top;
        }
        for (int i = 0; i < d; i++) sums[g * d + i] = 0;
        for (int u = 0; u < count; u++) {
            const float *part = units[u].part;
            float scale = exponential(part[shared * (d + 1) + g] - top);
            weights += scale * part[shared * d + g];
            for (int i = 0; i < d; i++) sums[g * d + i] += scale * part[g * d + i];
        }
        for (int i = 0; i < d; i++) sums[g * d + i] /= weights;
    }
    long first = (units->row * a->key_heads + units->head) * shared * d;
    narrow(sums, shared * d, a->output, a->type, first);
}

/* 0; 1 where there is no memory; 2 where the cache has no such place. */
int attend(
    const void *queries, const void *new_keys, const void *new_values, void *keys, void *values,
    void *output, const int64_t *slots, const int64_t *positions, long rows, long query_stride,
    long query_head_stride, long key_stride, long key_head_stride, long value_stride,
    long value_head_stride, long cached_slots, long cached_heads, long cached_tokens,
    long cached_dimensions, long window, int heads, int key_heads, int dimensions, float scaling,
    int type, int threads
) {
    int shared = heads / key_heads, size = type == FLOAT32 ? 4 : 2;
    long head_stride = cached_tokens * dimensions, slot_stride = key_heads * head_stride;
    long tokens = 0, units = 0;
    if (cached_heads != key_heads || cached_dimensions != dimensions || heads % key_heads) return 2;
    for (long r = 0; r < rows; r++)
        if (slots[r] < 0 || slots[r] >= cached_slots || positions[r] < 0 ||
            positions[r] >= cached_tokens) return 2;
    for (long r = 0; r < rows; r++) {
        for (int h = 0; h < key_heads; h++) {
            long place = slots[r] * slot_stride + h * head_stride + positions[r] * dimensions;
            long key = r * key_stride + h * key_head_stride;
            long value = r * value_stride + h * value_head_stride;
            long bytes = (long)dimensions * size;
            memcpy((char *)keys + place * size, (const char *)new_keys + key * size, bytes);
            memcpy((char *)values + place * size, (const char *)new_values + value * size, bytes);
        }
        long seen = positions[r] + 1;
        tokens += window && seen > window ? window : seen;
    }
    /* So that threads end at about the same time. */
    long split = tokens * key_heads / (threads * 4) + 1;
    split = split < LEAST_SPLIT ? LEAST_SPLIT : split;
    if (threads < 2) split = tokens;
    int is_split = 0;
    for (long r = 0; r < rows; r++) {
        long seen = positions[r] + 1;
        seen = window && seen > window ? window : seen;
        long parts = (seen + split - 1) / split;
        units += parts * key_heads;
        is_split |= parts > 1;
    }
    long part_size = (long)shared * (dimensions + 2);
    Unit *list = malloc(units * sizeof(Unit));
    float *parts = is_split ? malloc(units * part_size * sizeof(float)) : NULL;
    if (!list || (is_split && !parts)) {
        free(list);
        free(parts);
        return 1;
    }
    long number = 0;
    for (long r = 0; r < rows; r++) {
        long end = positions[r] + 1, begin = window && end > window ? end - window : 0;
        for (int h = 0; h < key_heads; h++)
            for (long b = begin; b < end; b += split, number++) {
                Unit unit = {r, b, b + split < end ? b + split : end, h, NULL};
                if (is_split) unit.part = parts + number * part_size;
                list[number] = unit;
            }
    }
    Attend work = {queries, keys, values, output, list, slots, query_stride, query_head_stride,
                   slot_stride, head_stride, scaling, key_heads, shared, dimensions, type, is_split};
    each_row(attend_row, &work, units, tokens * heads * dimensions, threads);
    if (is_split)
        for (long first = 0, next; first < units; first = next) {
            next = first + 1;
            while (next < units && list[next].row == list[first].row &&
                   list[next].head == list[first].head) next++;
            join(&work, list + first, next - first);
        }
    free(list);
    free(parts);
    return 0;
}
