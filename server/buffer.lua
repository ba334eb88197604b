#!lua name=servetune

-- What must happen at once or not at all, as Redis Functions (Redis >= 7.0, Valkey).
--
-- KEYS[1] is always the stream `servetune:{adapter}:queries`; the other keys share its prefix and, by the
-- braces, its cluster slot:
--   queries      one entry per stored query: ids, marks and sizes, never its content   (permanent)
--   ledger       how many queries were stored and what became of them                  (permanent)
--   clients      stored queries per client                                             (permanent)
--   waiting:CLIENT  ids of a client's entries that nobody took yet, by age
--   bytes        sum of the sizes of the sealed queries                                (permanent)
--   key          fingerprint of the key that seals them                                (permanent)
--   blob:ID      hash {entry, sealed}: where the query is in the stream, its ciphertext
--   seen:DIGEST  set while an equal query of the same client is refused
--   dead         stream of what was given up, without content
--   recent       when each query that is kept for review expires, in milliseconds; sizes has how large it is
--   kept:ID      hash of such a query: sealed, its ciphertext; and by pair of versions, what became of it there
--   review:PAIR  how many queries were compared between two versions, and how answers were judged
--   said         when the feedback on each answer may be forgotten; said:ID has which it was
--   feedback     feedback by version and kind                                          (permanent)
--
-- Every entry leaves the stream through `remove`, which also counts it. So always:
-- acked = trained + no_signal + rejected + dead + expired + withdrawn + XLEN(queries).

local GROUP = 'workers'
local SWEEP = 100 -- entries that one call expires at most, so that no call takes long

local function names(keys)
  local prefix = string.sub(keys[1], 1, -#'queries' - 1)
  return {
    queries = keys[1],
    ledger = prefix .. 'ledger',
    clients = prefix .. 'clients',
    waiting = prefix .. 'waiting:',
    bytes = prefix .. 'bytes',
    key = prefix .. 'key',
    blob = prefix .. 'blob:',
    seen = prefix .. 'seen:',
    dead = prefix .. 'dead',
    recent = prefix .. 'recent',
    sizes = prefix .. 'sizes',
    kept = prefix .. 'kept:',
    review = prefix .. 'review:',
    said = prefix .. 'said',
    feedback = prefix .. 'feedback',
  }
end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The fields of an entry, or nil if it was settled, withdrawn or expired.
local function find(k, id)
  local entry = redis.call('XRANGE', k.queries, id, id)[1]
  if not entry then return nil end
  local fields = { id = id }
  for i = 1, #entry[2], 2 do
    fields[entry[2][i]] = entry[2][i + 1]
  end
  return fields
end

-- Let a key live for so long at least.
local function outlast(key, ttl_ms)
  redis.call('PEXPIRE', key, math.max(ttl_ms, redis.call('PTTL', key)))
end

-- Keep a query for review no longer.
local function forget(k, query)
  local size = redis.call('HGET', k.sizes, query)
  if size then
    redis.call('HDEL', k.sizes, query)
    redis.call('HINCRBY', k.sizes, 'total', -size)
  end
  redis.call('ZREM', k.recent, query)
  redis.call('DEL', k.kept .. query)
end

-- Forget those whose time is over.
local function fade(k)
  for _, query in ipairs(redis.call('ZRANGEBYSCORE', k.recent, '-inf', now_ms(), 'LIMIT', 0, SWEEP)) do
    forget(k, query)
  end
end

-- Forget the oldest until what is kept has so few queries and bytes; SWEEP of them at most.
local function make_room(k, most, room)
  for _ = 1, SWEEP do
    local total = tonumber(redis.call('HGET', k.sizes, 'total') or 0)
    if redis.call('ZCARD', k.recent) <= most and total <= room then return end
    local oldest = redis.call('ZRANGE', k.recent, 0, 0)[1]
    if not oldest then return end
    forget(k, oldest)
  end
end

-- Keep a query for review, in place of the oldest.
local function keep(k, query, sealed, most, room, ttl_ms)
  fade(k)
  if most > 0 and #sealed <= room then
    redis.call('HSET', k.kept .. query, 'sealed', sealed)
    redis.call('PEXPIRE', k.kept .. query, ttl_ms)
    redis.call('ZADD', k.recent, now_ms() + ttl_ms, query)
    redis.call('HSET', k.sizes, query, #sealed)
    redis.call('HINCRBY', k.sizes, 'total', #sealed)
    outlast(k.recent, ttl_ms)
    outlast(k.sizes, ttl_ms)
  end
  make_room(k, most, room)
end

local function remove(k, entry, outcome)
  redis.call('XACK', k.queries, GROUP, entry.id)
  redis.call('XDEL', k.queries, entry.id)
  redis.call('ZREM', k.waiting .. entry.client, entry.id)
  redis.call('DEL', k.blob .. entry.query)
  redis.call('DECRBY', k.bytes, entry.size)
  if redis.call('HINCRBY', k.clients, entry.client, -1) <= 0 then
    redis.call('HDEL', k.clients, entry.client)
  end
  if outcome == 'withdrawn' then -- the same question may be asked to be kept again
    redis.call('DEL', k.seen .. entry.digest)
    forget(k, entry.query)
  end
  redis.call('HINCRBY', k.ledger, outcome, 1)
end

-- Give an entry up. Its content goes: a query that nobody could learn from is no reason to keep a picture.
local function bury(k, entry, reason, ttl_ms)
  remove(k, entry, 'dead')
  forget(k, entry.query)
  redis.call('XADD', k.dead, '*', 'query', entry.query, 'digest', entry.digest, 'reason', reason)
  redis.call('XTRIM', k.dead, 'MINID', now_ms() - ttl_ms)
  redis.call('PEXPIRE', k.dead, ttl_ms)
end

-- Count out entries older than their content may live. Stream ids begin with the time in milliseconds.
local function sweep(k, ttl_ms)
  for _, old in ipairs(redis.call('XRANGE', k.queries, '-', now_ms() - ttl_ms - 1, 'COUNT', SWEEP)) do
    remove(k, find(k, old[1]), 'expired')
  end
end

-- What a worker gets of an entry, or nil if there is nothing left to learn from.
local function delivery(k, id, deliveries)
  local entry = find(k, id)
  if not entry then
    redis.call('XACK', k.queries, GROUP, id)
    return nil
  end
  local sealed = redis.call('HGET', k.blob .. entry.query, 'sealed')
  if not sealed then
    remove(k, entry, 'expired')
    return nil
  end
  return { id, entry.query, sealed, deliveries }
end

-- Milliseconds at which an entry was stored: ids begin with them.
local function stored_ms(id)
  return tonumber(string.match(id, '^%d+'))
end

local function wait(k, client, id)
  redis.call('ZADD', k.waiting .. client, stored_ms(id), id)
end

-- The oldest entry of a client that nobody took yet, which is then taken; or nil.
local function take_oldest(k, client)
  return redis.call('ZPOPMIN', k.waiting .. client)[1]
end

-- Clients with entries that nobody took yet: the one that waits longest first.
local function waiting_clients(k)
  local found = {}
  for _, client in ipairs(redis.call('HKEYS', k.clients)) do
    local oldest = redis.call('ZRANGE', k.waiting .. client, 0, 0)[1]
    if oldest then
      local num = redis.call('ZCARD', k.waiting .. client)
      found[#found + 1] = { client = client, oldest = stored_ms(oldest), num = num }
    end
  end
  table.sort(found, function(a, b)
    if a.oldest ~= b.oldest then return a.oldest < b.oldest end
    return a.client < b.client
  end)
  return found
end

-- Ids of stored entries that nobody took yet, at most `limit`: of each client in turn the oldest. After the first
-- turn those with the fewest come first, so that whoever sends most has an equal part and no more.
local function fair(k, limit)
  local ids, clients = {}, waiting_clients(k)
  local left = #clients > 0
  while left and #ids < limit do
    left = false
    for _, each in ipairs(clients) do
      local id = #ids < limit and take_oldest(k, each.client)
      if id then
        ids[#ids + 1] = id
        left = true
      end
    end
    table.sort(clients, function(a, b)
      if a.num ~= b.num then return a.num < b.num end
      return a.client < b.client
    end)
  end
  return ids
end

-- The deliveries so far of an entry if `consumer` still holds its lease, else nil.
local function held(k, consumer, id)
  local lease = redis.call('XPENDING', k.queries, GROUP, id, id, 1, consumer)[1]
  return lease and find(k, id) and lease[4]
end

-- Whether `consumer` holds any lease that has not run out.
local function works(k, consumer, lease_ms)
  for _, lease in ipairs(redis.call('XPENDING', k.queries, GROUP, '-', '+', 1000, consumer)) do
    if lease[3] < lease_ms then return true end
  end
  return false
end

-- Only storing more needs memory to spare: a full server must still be emptied.
local function register(name, call)
  redis.register_function {
    function_name = 'servetune_' .. name,
    callback = function(keys, args) return call(names(keys), unpack(args)) end,
    flags = name == 'enqueue' and {} or { 'allow-oom' },
  }
end

-- Let entries wait that an earlier version of this file stored: those that nobody holds.
local function adopt(k)
  for _, client in ipairs(redis.call('HKEYS', k.clients)) do
    if redis.call('EXISTS', k.waiting .. client) > 0 then return end
  end
  for _, entry in ipairs(redis.call('XRANGE', k.queries, '-', '+')) do
    local id = entry[1]
    if #redis.call('XPENDING', k.queries, GROUP, id, id, 1) == 0 then wait(k, find(k, id).client, id) end
  end
end

-- fingerprint, whether its owner decides -> the fingerprint that holds
register('setup', function(k, fingerprint, decides)
  local made = redis.pcall('XGROUP', 'CREATE', k.queries, GROUP, '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then return made end
  if decides == '1' then redis.call('SET', k.key, fingerprint) end
  adopt(k)
  return redis.call('GET', k.key) or fingerprint
end)

-- -> the reason to refuse it, or '' once it is stored
register('enqueue', function(k, query, digest, client, sealed, ttl_ms, max_entries, max_bytes, client_cap,
                             most_kept, kept_bytes, kept_ttl_ms)
  sweep(k, tonumber(ttl_ms))
  if redis.call('EXISTS', k.seen .. digest, k.blob .. query) > 0 then return 'duplicate' end
  local bytes = tonumber(redis.call('GET', k.bytes) or 0)
  if redis.call('XLEN', k.queries) >= tonumber(max_entries) or bytes + #sealed > tonumber(max_bytes) then
    return 'buffer_full'
  end
  local mine = tonumber(redis.call('HGET', k.clients, client) or 0)
  local others = redis.call('HLEN', k.clients) - math.min(mine, 1)
  if others > 0 and mine >= tonumber(client_cap) then return 'client_share' end
  local id = redis.call('XADD', k.queries, '*', 'query', query, 'digest', digest, 'client', client, 'size', #sealed)
  redis.call('HSET', k.blob .. query, 'entry', id, 'sealed', sealed)
  redis.call('PEXPIRE', k.blob .. query, ttl_ms)
  redis.call('SET', k.seen .. digest, query, 'PX', ttl_ms)
  redis.call('HINCRBY', k.clients, client, 1)
  wait(k, client, id)
  redis.call('PEXPIRE', k.waiting .. client, ttl_ms)
  redis.call('INCRBY', k.bytes, #sealed)
  redis.call('HINCRBY', k.ledger, 'acked', 1)
  keep(k, query, sealed, tonumber(most_kept), tonumber(kept_bytes), tonumber(kept_ttl_ms))
  return ''
end)

-- Deliver entries whose lease ran out. One on its last delivery comes alone, to a consumer without other work,
-- so that a query that kills its worker takes no other with it to the dead.
register('claim', function(k, consumer, limit, lease_ms, max_deliveries, ttl_ms)
  sweep(k, tonumber(ttl_ms))
  local last, rows, busy = tonumber(max_deliveries), {}, works(k, consumer, tonumber(lease_ms))
  for _, lease in ipairs(redis.call('XPENDING', k.queries, GROUP, 'IDLE', lease_ms, '-', '+', limit)) do
    local id, next_delivery = lease[1], lease[4] + 1
    local entry = find(k, id)
    if entry and next_delivery > last then
      bury(k, entry, 'deliveries', tonumber(ttl_ms))
    elseif next_delivery < last or (#rows == 0 and not busy) then
      redis.call('XCLAIM', k.queries, GROUP, consumer, lease_ms, id)
      rows[#rows + 1] = delivery(k, id, next_delivery)
      if next_delivery == last and #rows > 0 then return rows end
    end
  end
  return rows
end)

-- Deliver entries for the first time -> {the entries, the id after which the next will be stored}
register('take', function(k, consumer, limit)
  local rows, ids = {}, fair(k, tonumber(limit))
  for _, id in ipairs(ids) do
    -- FORCE makes the lease of an entry that nobody had yet.
    redis.call('XCLAIM', k.queries, GROUP, consumer, 0, id, 'FORCE', 'RETRYCOUNT', 1, 'JUSTID')
    rows[#rows + 1] = delivery(k, id, 1)
  end
  return { rows, redis.call('XINFO', 'STREAM', k.queries)[8] }
end)

-- -> the ids whose lease `consumer` still holds, renewed
register('renew', function(k, consumer, ...)
  local kept = {}
  for _, id in ipairs({ ... }) do
    if held(k, consumer, id) then
      redis.call('XCLAIM', k.queries, GROUP, consumer, 0, id, 'IDLE', 0, 'JUSTID')
      kept[#kept + 1] = id
    end
  end
  return kept
end)

-- End leases early. A delivery given back counts only if it failed.
register('release', function(k, consumer, lease_ms, failed, ...)
  for _, id in ipairs({ ... }) do
    local deliveries = held(k, consumer, id)
    if deliveries then
      local counted = failed == '1' and deliveries or math.max(deliveries - 1, 0)
      redis.call('XCLAIM', k.queries, GROUP, consumer, 0, id,
        'IDLE', lease_ms, 'RETRYCOUNT', counted, 'JUSTID')
    end
  end
end)

-- -> how many were settled now; one settled before, withdrawn or expired is not counted again
register('settle', function(k, outcome, ...)
  local settled = 0
  for _, id in ipairs({ ... }) do
    local entry = find(k, id)
    if entry then
      remove(k, entry, outcome)
      settled = settled + 1
    end
  end
  return settled
end)

register('dead_letter', function(k, reason, ttl_ms, id)
  local entry = find(k, id)
  if entry then bury(k, entry, reason, tonumber(ttl_ms)) end
end)

-- -> 1 if the query was still in the buffer, else 0; kept for review it is in neither case
register('withdraw', function(k, query)
  forget(k, query)
  local id = redis.call('HGET', k.blob .. query, 'entry')
  local entry = id and find(k, id)
  if not entry then return 0 end
  remove(k, entry, 'withdrawn')
  return 1
end)

-- -> how many were withdrawn, at most `limit`
register('purge', function(k, limit)
  local entries = redis.call('XRANGE', k.queries, '-', '+', 'COUNT', limit)
  for _, entry in ipairs(entries) do
    remove(k, find(k, entry[1]), 'withdrawn')
  end
  return #entries
end)

-- -> how many that were kept for review are forgotten, at most `limit`
register('forget', function(k, limit)
  local queries = redis.call('ZRANGE', k.recent, 0, limit - 1)
  for _, query in ipairs(queries) do
    forget(k, query)
  end
  return #queries
end)

-- -> of the queries kept for review, the newest first: id, what became of it between two versions, or ''
register('recent', function(k, pair)
  fade(k)
  local rows = {}
  for _, query in ipairs(redis.call('ZREVRANGE', k.recent, 0, -1)) do
    rows[#rows + 1] = query
    rows[#rows + 1] = redis.call('HGET', k.kept .. query, pair) or ''
  end
  return rows
end)

-- -> the ciphertext of a query kept for review, or nil
register('recall', function(k, query)
  return redis.call('HGET', k.kept .. query, 'sealed')
end)

-- Note what became of a query between two versions: compared once (`same`, `different`), then judged where it is
-- different, and judged anew. -> 1, or 0 where that does not follow
register('mark', function(k, query, pair, mark, ttl_ms)
  if redis.call('EXISTS', k.kept .. query) == 0 then return 0 end
  local before = redis.call('HGET', k.kept .. query, pair)
  local compared = mark == 'same' or mark == 'different'
  if compared and before or not compared and (not before or before == 'same') then return 0 end
  if before and before ~= 'different' then redis.call('HINCRBY', k.review .. pair, before, -1) end
  redis.call('HSET', k.kept .. query, pair, mark)
  redis.call('HINCRBY', k.review .. pair, mark, 1)
  redis.call('PEXPIRE', k.review .. pair, ttl_ms)
  return 1
end)

register('review', function(k, pair)
  return redis.call('HGETALL', k.review .. pair)
end)

-- Count the feedback on an answer, the last word on each; remembered of `most` answers, and for `versions` versions.
register('say', function(k, answer, version, kind, ttl_ms, most, versions)
  local before = redis.call('GET', k.said .. ':' .. answer)
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', k.said, '-inf', now_ms(), 'LIMIT', 0, SWEEP)) do
    redis.call('ZREM', k.said, old)
  end
  if before ~= kind then
    if before then redis.call('HINCRBY', k.feedback, version .. ' ' .. before, -1) end
    redis.call('HINCRBY', k.feedback, version .. ' ' .. kind, 1)
  end
  redis.call('SET', k.said .. ':' .. answer, kind, 'PX', ttl_ms)
  redis.call('ZADD', k.said, now_ms() + ttl_ms, answer)
  outlast(k.said, tonumber(ttl_ms))
  if redis.call('ZCARD', k.said) > tonumber(most) then
    redis.call('DEL', k.said .. ':' .. redis.call('ZPOPMIN', k.said)[1])
  end
  local names = redis.call('HKEYS', k.feedback)
  if #names > 2 * tonumber(versions) then
    table.sort(names)
    redis.call('HDEL', k.feedback, names[1])
  end
end)

-- -> waiting, pending, dead, bytes, {ledger}, age of the oldest entry in milliseconds, kept for review, {feedback}
register('status', function(k, ttl_ms)
  sweep(k, tonumber(ttl_ms))
  fade(k)
  local pending = redis.call('XPENDING', k.queries, GROUP)[1]
  local oldest = redis.call('XRANGE', k.queries, '-', '+', 'COUNT', 1)[1]
  return {
    redis.call('XLEN', k.queries) - pending,
    pending,
    redis.call('XLEN', k.dead),
    tonumber(redis.call('GET', k.bytes) or 0),
    redis.call('HGETALL', k.ledger),
    oldest and math.max(0, now_ms() - stored_ms(oldest[1])) or 0,
    redis.call('ZCARD', k.recent),
    redis.call('HGETALL', k.feedback),
  }
end)

-- Forget this consumer and those that died, unless they hold work.
register('leave', function(k, consumer, idle_ms)
  for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', k.queries, GROUP)) do
    local name, pending, idle = flat[2], flat[4], flat[6]
    if pending == 0 and (name == consumer or idle > tonumber(idle_ms)) then
      redis.call('XGROUP', 'DELCONSUMER', k.queries, GROUP, name)
    end
  end
end)
