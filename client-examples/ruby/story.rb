# One story over the API: define a guest, start it, preview two strategies, make a mirror, check and run a migration,
# follow it by events with a resume in the middle, and act on three errors by their codes.
#
# The library mirrorvm is generated from openapi/v1.json by ./run. MIRRORVM_A and MIRRORVM_B are the daemons' URLs,
# MIRRORVM_A_TOKEN and MIRRORVM_B_TOKEN bearer tokens for them.

require 'json'
require 'securerandom'
require 'uri'
require 'mirrorvm'

# A daemon.
class Daemon
  attr_reader :guests, :mirrors, :migrations, :events

  def initialize(variable)
    url = URI(ENV.fetch(variable))
    configuration = Mirrorvm::Configuration.new do |c|
      c.scheme = url.scheme
      c.host = "#{url.host}:#{url.port}"
      c.access_token = ENV.fetch("#{variable}_TOKEN")
      # Arrays in queries are repeated names, not `state[0]=`.
      c.params_encoding = :multi
      c.timeout = 60
    end
    client = Mirrorvm::ApiClient.new(configuration)
    @guests = Mirrorvm::GuestsApi.new(client)
    @mirrors = Mirrorvm::MirrorsApi.new(client)
    @migrations = Mirrorvm::MigrationsApi.new(client)
    @events = Mirrorvm::EventsApi.new(client)
  end

  def get(guest)
    guests.guest_get(guest)
  end

  def wait_for(guest, state)
    now = get(guest)
    until now.state == state
      begin
        now = guests.guest_get(guest, wait: '30s', if_none_match: "\"#{now.generation}\"")
      rescue Mirrorvm::ApiError => e
        # 304: nothing has changed yet.
        raise unless e.code == 304
      end
    end
    now
  end

  def relabel(guest, tag)
    guests.guest_update(guest, Mirrorvm::GuestUpdate.new(labels: { 'by' => 'ruby' }), if_match: tag)
  end
end

def check(holds, what = 'does not hold')
  raise what.to_s unless holds
end

# The problem (RFC 9457) that an operation was refused with: programs go by its code.
def problem(error)
  Mirrorvm::Problem.build_from_hash(JSON.parse(error.response_body, symbolize_names: true))
end

def refused(code)
  yield
rescue Mirrorvm::ApiError => e
  check problem(e).code == code, e.response_body
else
  raise "nothing refused, expected #{code}"
end

a, b = %w[MIRRORVM_A MIRRORVM_B].map { |variable| Daemon.new(variable) }
name = "rb-#{SecureRandom.hex(4)}"

definition = Mirrorvm::GuestCreate.new(
  name: name,
  driver: Mirrorvm::DriverEmbedded.new(vcpus: 1),
  memory: Mirrorvm::Memory.new(blocks: [Mirrorvm::MemoryBlock.new(name: 'ram0', size_bytes: 32 << 20, gpa: 0)])
)
guest = a.guests.guest_create(definition)
check guest.state == 'stopped' && guest.driver.kind == 'embedded', guest
a.guests.guest_start(name)
guest = a.wait_for(name, 'running')
puts "runs: #{guest.name} #{guest.id}"

# Whatever other guests the daemon has, and whatever drivers run them.
kinds = a.guests.guest_list(limit: 1000).items.map { |one| one.driver.kind }.uniq
check kinds.include?('embedded'), kinds
begin
  a.get('nobody')
rescue Mirrorvm::ApiError => e
  puts "drivers: #{kinds} and nobody is #{problem(e).code}"
end

shifted = Mirrorvm::StrategyShifted.new(shift: Mirrorvm::ShiftFourGib.new)
[shifted, Mirrorvm::StrategyIdentityCbit.new].each do |strategy|
  plan = a.guests.address_space_plan_create(name, Mirrorvm::AddressSpacePlanCreate.new(strategy: strategy))
  puts "#{plan.strategy.kind} has #{plan.slots.length} slots"
rescue Mirrorvm::ApiError => e
  # A host may not execute a strategy; the plan says why.
  check problem(e).code == 'plan_refused', e.response_body
  puts problem(e).errors.first.detail
end

mirror = a.mirrors.mirror_create(Mirrorvm::MirrorCreate.new(guest: name, strategy: shifted))
check mirror.state == 'ready', mirror
a.mirrors.mirror_delete(mirror.id)

move = Mirrorvm::MigrationCreate.new(guest: name, destination: Mirrorvm::DestinationHost.new(host: 'b'))
look = a.migrations.migration_check_create(move)
check look.migratable, look
page = a.events.event_list(limit: 1000)
page = a.events.event_list(limit: 1000, after: page.next_cursor) while page.more
cursor = page.next_cursor
key = { idempotency_key: "#{name}-move" }
migration = a.migrations.migration_create(move, key)
check a.migrations.migration_create(move, key).id == migration.id, 'a repeated request has no second effect'

# Events, a few at a time; every call resumes where the last one ended, as a client that was restarted would.
states = ['queued']
until %w[succeeded failed canceled].include?(states.last)
  some = a.events.event_list(after: cursor, resource: [migration.id], limit: 2, wait: '30s')
  changed = some.items.select { |event| event.type == 'migration.state_changed' }
  states.concat(changed.map { |event| event.data.state })
  cursor = some.next_cursor
end
puts "states: #{states.join(' ')}"
check states.last == 'succeeded', states
# It is the destination's from then on, and runs there a moment later.
b.wait_for(name, 'running')

# Three errors, each acted on by its code.
refused('guest_moved') { a.guests.guest_start(name) }
check b.get(name).id == guest.id, "so it is the other host's now"
refused('name_taken') { b.guests.guest_create(definition) }
check b.get(name).id == guest.id, 'so the one that is there will do'
refused('precondition_failed') { b.relabel(name, '"1"') }
# So it is read again; until nobody has changed it meanwhile, as the audit does when it has come to an end.
begin
  relabelled = b.relabel(name, "\"#{b.get(name).generation}\"")
rescue Mirrorvm::ApiError => e
  raise unless problem(e).code == 'precondition_failed'

  retry
end
check relabelled.labels[:by] == 'ruby' || relabelled.labels['by'] == 'ruby', relabelled.labels

b.guests.guest_stop(name)
b.wait_for(name, 'stopped')
[b, a].each { |daemon| daemon.guests.guest_delete(name) }
puts 'the story went well with Ruby'
