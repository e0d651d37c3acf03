-- The durable runs of one user, as RunTable in zcproto/runs/log.py keeps them. The only key is d:{TAG}.
--
-- ARGV[1] is a MessagePack array: the operation, prefix, TAG, id, PUBLISH or SPUBLISH, the time in ms or false for that
-- of the server, limits, arguments. The answer is one, too.
--
-- Keys, after the prefix. TAG stands for a user, as in sessions.lua.
--   d:{TAG}    the runs of a user: a hash from an id to its place in the order of starting and the bytes of its items;
--              and the channel on which the id of a run that has changed is published: after an append with the process
--   g:{TAG}    ids of runs that have gone, by the time until which they are known: a sorted set
--   j:{TAG}ID  a run, see below
--   k:{TAG}ID  its items: a list
--
-- A run is an array of its FIELDS, which takes a third of a hash: i info, g generation, m method, q digest, b bound; f first, n next, t taken, a attachment, o order, d attached,
-- c cancel, z full, ec and eb the end; s bytes of items and the end, u of those that were not taken, k kept until, x dropped at.

local given = cmsgpack.unpack(ARGV[1])
local OPERATION, P, TAG, ID, PUBLISH, now, limits, arguments = unpack(given)
local ITEMS, BYTES, RUNS, USER_BYTES, KEEP = unpack(limits)
local ITEM_BYTES, OVERHEAD, KNOWN, MAX_KNOWN, LONGEST_KEEP = 64, 40, 600000, 4096, 3600000
local TTL = 2 * LONGEST_KEEP
local USER, GONE = KEYS[1], P .. 'g:{' .. TAG .. '}'
local FIELDS = {'i', 'g', 'm', 'q', 'b', 'f', 'n', 't', 'a', 'o', 'd', 'c', 'z', 'ec', 'eb', 's', 'u', 'k', 'x'}

if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

local function run_key(id)
  return P .. 'j:{' .. TAG .. '}' .. id
end

local function items_key(id)
  return P .. 'k:{' .. TAG .. '}' .. id
end

local function size_of(body)
  return ITEM_BYTES + #body - OVERHEAD
end

local function wake(id, process)
  redis.call(PUBLISH, USER, process and id .. '\0' .. process or id)
end

-- The runs of the user: places and sizes by id, and the ids in the order of starting.
local function index()
  local flat, places, sizes, ids = redis.call('HGETALL', USER), {}, {}, {}
  for i = 1, #flat, 2 do
    local place, size = flat[i + 1]:match('(%d+) (%d+)')
    places[flat[i]], sizes[flat[i]] = tonumber(place), tonumber(size)
    ids[#ids + 1] = flat[i]
  end
  table.sort(ids, function(one, other) return places[one] < places[other] end)
  return places, sizes, ids
end

local function total(sizes)
  local sum = 0
  for _, size in pairs(sizes) do
    sum = sum + size
  end
  return sum
end

local function drop(id)
  redis.call('DEL', run_key(id), items_key(id))
  redis.call('HDEL', USER, id)
  redis.call('ZADD', GONE, string.format('%.0f', now + KNOWN), id)
  redis.call('PEXPIRE', GONE, KNOWN)
  wake(id)
end

local function is_over(run)
  local is_read = run.d and now < run.x
  return run.ec and not is_read and now >= math.min(run.k, run.x)
end

-- Return a run, or nil.
local function load(id)
  local packed, run = redis.call('GET', run_key(id)), {id = id}
  if not packed then
    return nil
  end
  for i, value in ipairs(cmsgpack.unpack(packed)) do
    run[FIELDS[i]] = value
  end
  if is_over(run) then
    drop(id)
    return nil
  end
  return run
end

local function save(run, place)
  local values = {}
  for i, name in ipairs(FIELDS) do
    values[i] = run[name]
  end
  redis.call('SET', run_key(run.id), cmsgpack.pack(values), 'PX', TTL)
  place = place or redis.call('HGET', USER, run.id):match('%d+')
  redis.call('HSET', USER, run.id, string.format('%d %.0f', place, run.s))
  redis.call('PEXPIRE', items_key(run.id), TTL)
  redis.call('PEXPIRE', USER, TTL)
end

-- What a process gets of a run, which may know what is fixed of it.
local function state(run, knows_info)
  local ended = run.ec and {run.ec, run.eb}
  return {not knows_info and run.i, run.f, run.n, run.t, run.a, run.o, run.d, run.c, ended, run.z}
end

local function is_known(id)
  redis.call('ZREMRANGEBYSCORE', GONE, '-inf', string.format('%.0f', now))
  return redis.call('ZSCORE', GONE, id)
end

local function create(id, info)
  local packed, generation, method, digest, is_bound = unpack(info)
  local run = {
    id = id, i = packed, g = generation, m = method, q = digest, b = is_bound, f = 0, n = 0, t = 0, a = '',
    o = 0, d = false, c = '', z = false, ec = false, eb = '', s = 0, u = 0, k = 0, x = 0,
  }
  local places, last = index(), 0
  for _, place in pairs(places) do
    last = math.max(last, place)
  end
  save(run, last + 1)
  return run
end

-- Drop the run that ended first. Return its id, or nil.
local function drop_ended(ids, but)
  local oldest, oldest_at
  for _, id in ipairs(ids) do
    local run = id ~= but and load(id)
    if run and run.ec then
      if not oldest or run.x < oldest_at or (run.x == oldest_at and id < oldest) then
        oldest, oldest_at = id, run.x
      end
    end
  end
  if oldest then
    drop(oldest)
  end
  return oldest
end

-- Drop the runs that are not kept any more. Those whose keys have expired have gone, too.
local function sweep()
  local _, _, ids = index()
  for _, id in ipairs(ids) do
    if not load(id) and redis.call('HEXISTS', USER, id) == 1 then
      drop(id)
    end
  end
end

local function is_full(run, user_size)
  return run.n > run.t and (run.n - run.t >= ITEMS or run.u >= BYTES or user_size >= USER_BYTES)
end

local function drop_item(run)
  local size = size_of(redis.call('LPOP', items_key(run.id)))
  run.s, run.f = run.s - size, run.f + 1
  return size
end

local function attach(run, attachment, order)
  run.a, run.o, run.d = attachment, order, true
end

-- Whether an attachment is the newest. One that is newer than any which is known was lost.
local function is_read_by(run, attachment, order)
  if attachment ~= run.a and order > run.o then
    attach(run, attachment, order)
    save(run)
  end
  return attachment == run.a
end

local operations = {}

function operations.open(method, digest, position, attachment, is_bound, info)
  local run = load(ID)
  if not run then
    if not info or position > 0 or is_known(ID) then
      return {'missing'}
    end
    sweep()
    local _, _, ids = index()
    local count, known = #ids, redis.call('ZCARD', GONE)
    while known < MAX_KNOWN and count >= RUNS and drop_ended(ids, '') do
      count = count - 1
    end
    if count >= RUNS or known >= MAX_KNOWN then
      return {'exhausted'}
    end
    run = create(ID, info)
  elseif method ~= run.m or (digest and digest ~= run.q) then
    return {'other'}
  elseif run.b and not is_bound then
    return {'unbound'}
  elseif position < run.f or (position > run.n and run.ec) then
    return {'range', run.f, run.n}
  end
  if attachment ~= run.a then
    attach(run, attachment, run.o + 1)
  end
  run.d = true
  save(run)
  wake(ID)
  return {'done', info and info[2] == run.g, state(run)}
end

-- Wake the other runs that wait for room at the bound of the user.
local function wake_waiting(ids)
  for _, id in ipairs(ids) do
    local other = id ~= ID and load(id)
    if other and other.z then
      wake(id)
    end
  end
end

-- Record what a reader has taken of a run, and return whether that changes the run.
local function take(run, attachment, position, order)
  position = math.min(position, run.n)
  if not is_read_by(run, attachment, order) or position <= run.t then
    return false
  end
  for _, body in ipairs(redis.call('LRANGE', items_key(run.id), run.t - run.f, position - run.f - 1)) do
    run.u = run.u - size_of(body)
  end
  run.t = position
  return true
end

function operations.append(generation, first, bodies, code, body, taken, process)
  local run = load(ID)
  if not run or run.g ~= generation then
    return {'fenced'}
  elseif run.ec then
    if code == run.ec and first + #bodies == run.n then
      return {'done', state(run, true)}
    end
    return {'fenced'}
  elseif first > run.n or (code and first + #bodies < run.n) then
    return {'gap', run.n}
  end
  local has_taken = taken and take(run, unpack(taken))
  local _, sizes, ids = index()
  if has_taken and total(sizes) >= USER_BYTES then
    wake_waiting(ids)
  end
  for i = run.n - first + 1, #bodies do
    local size = size_of(bodies[i])
    redis.call('RPUSH', items_key(ID), bodies[i])
    run.s, run.u, run.n = run.s + size, run.u + size, run.n + 1
  end
  if code then
    run.ec, run.eb, run.k, run.x = code, body, now + KEEP, now + LONGEST_KEEP
    run.s = run.s + size_of(body)
  end
  while run.f < run.t and (run.n - run.f > ITEMS or run.s > BYTES) do
    drop_item(run)
  end
  sizes[ID] = run.s
  local user_size = total(sizes)
  if user_size >= USER_BYTES then
    for _, id in ipairs(ids) do
      local other, has_changed = id == ID and run or load(id), false
      while other and other.f < other.t and user_size >= USER_BYTES do
        user_size, has_changed = user_size - drop_item(other), true
      end
      sizes[id] = other and other.s or 0
      if has_changed and id ~= ID then
        save(other)
      end
    end
    while user_size >= USER_BYTES do
      local dropped = drop_ended(ids, ID)
      if not dropped then
        break
      end
      user_size = user_size - sizes[dropped]
    end
  end
  run.z = is_full(run, user_size)
  save(run)
  if (#bodies > 0 or code) and run.a:match('^[^.]*') ~= process then
    wake(ID, process)
  end
  return {'done', state(run, true)}
end

function operations.restore(info, taken, attachment, order, is_attached, cancel)
  local run = load(ID)
  if not run then
    if is_known(ID) then
      return false
    end
    run = create(ID, info)
    attach(run, attachment, order)
    run.d, run.c = is_attached, cancel
  end
  if run.g ~= info[2] or run.ec then
    return false
  end
  if run.n < taken then
    redis.call('DEL', items_key(ID))
    run.f, run.n, run.t, run.s, run.u = taken, taken, taken, 0, 0
  end
  save(run)
  return true
end

function operations.read(attachment, position, items, size, order)
  local run = load(ID)
  if not run then
    return {'missing'}
  elseif not is_read_by(run, attachment, order) then
    return {'superseded'}
  elseif position < run.f or (position > run.n and run.ec) then
    return {'range', run.f, run.n}
  end
  local found, bodies = redis.call('LRANGE', items_key(ID), position - run.f, position - run.f + items - 1), {}
  for i, body in ipairs(found) do
    size = size - size_of(body)
    if i > 1 and size < 0 then
      break
    end
    bodies[i] = body
  end
  return {'done', state(run), bodies}
end

function operations.take(attachment, position, order)
  local run = load(ID)
  if not run or not take(run, attachment, position, order) then
    return false
  end
  local _, sizes, ids = index()
  local user_size = total(sizes)
  local was_full = run.z
  run.z = is_full(run, user_size)
  save(run)
  if was_full and not run.z then
    wake(ID)
  end
  if user_size >= USER_BYTES then
    wake_waiting(ids)
  end
  return true
end

function operations.detach(attachment)
  local run = load(ID)
  if run and run.a == attachment and run.d then
    run.d, run.k = false, now + KEEP
    save(run)
    wake(ID)
  end
  return true
end

function operations.cancel(reason)
  local run = load(ID)
  if not run or run.ec then
    return false
  end
  if run.c == '' then
    run.c = reason
    save(run)
    wake(ID)
  end
  return true
end

function operations.runs()
  sweep()
  local _, _, ids = index()
  local found = {}
  for _, id in ipairs(ids) do
    found[#found + 1] = {id, state(load(id))}
  end
  return found
end

function operations.forget()
  local _, _, ids = index()
  for _, id in ipairs(ids) do
    drop(id)
  end
  return #ids
end

return cmsgpack.pack(operations[OPERATION](unpack(arguments)))
