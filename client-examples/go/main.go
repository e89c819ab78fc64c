// One story over the API: define a guest, start it, preview two strategies, make a mirror, check and run a migration,
// follow it by events with a resume in the middle, and act on three errors by their codes.
//
// The package mirrorvm is generated from openapi/v1.json by ./run. MIRRORVM_A and MIRRORVM_B are the daemons' URLs,
// MIRRORVM_A_TOKEN and MIRRORVM_B_TOKEN bearer tokens for them.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"strings"
	"time"

	"example/mirrorvm"
)

// A daemon, and the context that carries the token for it.
type daemon struct {
	*mirrorvm.APIClient
	ctx context.Context
}

func at(variable string) daemon {
	url, token := os.Getenv(variable), os.Getenv(variable+"_TOKEN")
	if url == "" || token == "" {
		log.Fatalf("%s or %s_TOKEN is not set", variable, variable)
	}
	configuration := mirrorvm.NewConfiguration()
	configuration.Servers = mirrorvm.ServerConfigurations{{URL: url}}
	ctx := context.WithValue(context.Background(), mirrorvm.ContextAccessToken, token)
	return daemon{mirrorvm.NewAPIClient(configuration), ctx}
}

// The problem (RFC 9457) that an operation was refused with: programs go by its code.
func problem(err error) *mirrorvm.Problem {
	var failed *mirrorvm.GenericOpenAPIError
	if errors.As(err, &failed) {
		if problem, ok := failed.Model().(mirrorvm.Problem); ok {
			return &problem
		}
	}
	return nil
}

// The answer of an operation that must succeed.
func must[T any](answer T, _ *http.Response, err error) T {
	if err != nil {
		if problem := problem(err); problem != nil {
			log.Fatalf("%d %s: %s", problem.Status, problem.Code, problem.Detail)
		}
		log.Fatal(err)
	}
	return answer
}

func refused[T any](code string) func(T, *http.Response, error) {
	return func(_ T, _ *http.Response, err error) {
		if problem := problem(err); problem == nil || problem.Code != code {
			log.Fatalf("not refused with %s, but: %v", code, err)
		}
	}
}

func check(holds bool, what ...any) {
	if !holds {
		log.Fatal(what...)
	}
}

func (d daemon) get(guest string) *mirrorvm.Guest {
	return must(d.GuestsAPI.GuestGet(d.ctx, guest).Execute())
}

func (d daemon) waitFor(guest, state string) *mirrorvm.Guest {
	now := d.get(guest)
	for now.State != state {
		tag := fmt.Sprintf("\"%d\"", now.Generation)
		changed, answer, err := d.GuestsAPI.GuestGet(d.ctx, guest).Wait("30s").IfNoneMatch(tag).Execute()
		// 304: nothing has changed yet.
		if answer == nil || answer.StatusCode != http.StatusNotModified {
			now = must(changed, answer, err)
		}
	}
	return now
}

func (d daemon) relabel(guest, tag string) mirrorvm.ApiGuestUpdateRequest {
	by, update := "go", mirrorvm.NewGuestUpdate()
	update.SetLabels(map[string]*string{"by": &by})
	return d.GuestsAPI.GuestUpdate(d.ctx, guest).GuestUpdate(*update).IfMatch(tag)
}

func main() {
	log.SetFlags(0)
	a, b := at("MIRRORVM_A"), at("MIRRORVM_B")
	name := fmt.Sprintf("go-%x", time.Now().UnixNano())

	block := mirrorvm.NewMemoryBlock("ram0", 32<<20)
	block.SetGpa(0)
	driver := mirrorvm.DriverEmbeddedAsDriver(mirrorvm.NewDriverEmbedded())
	definition := mirrorvm.NewGuestCreate(name, driver, *mirrorvm.NewMemory([]mirrorvm.MemoryBlock{*block}))
	guest := must(a.GuestsAPI.GuestCreate(a.ctx).GuestCreate(*definition).Execute())
	check(guest.State == "stopped" && guest.Driver.Kind == "embedded", guest.State, guest.Driver.Kind)
	must(a.GuestsAPI.GuestStart(a.ctx, name).Execute())
	guest = a.waitFor(name, "running")
	fmt.Println("runs:", guest.Name, guest.Id)

	// Whatever other guests the daemon has, and whatever drivers run them.
	kinds := map[string]bool{}
	for _, guest := range must(a.GuestsAPI.GuestList(a.ctx).Limit(1000).Execute()).Items {
		kinds[guest.Driver.Kind] = true
	}
	check(kinds["embedded"], kinds)
	_, _, err := a.GuestsAPI.GuestGet(a.ctx, "nobody").Execute()
	fmt.Println("drivers:", kinds, "and nobody is", problem(err).Code)

	shift := mirrorvm.ShiftFourGibAsShift(mirrorvm.NewShiftFourGib())
	shifted := mirrorvm.StrategyShiftedAsStrategy(mirrorvm.NewStrategyShifted(shift))
	identity := mirrorvm.StrategyIdentityCbitAsStrategy(mirrorvm.NewStrategyIdentityCbit())
	for _, strategy := range []mirrorvm.Strategy{shifted, identity} {
		wanted := mirrorvm.NewAddressSpacePlanCreate(strategy)
		plan, answer, err := a.GuestsAPI.AddressSpacePlanCreate(a.ctx, name).AddressSpacePlanCreate(*wanted).Execute()
		if problem := problem(err); problem != nil && problem.Code == "plan_refused" {
			// A host may not execute a strategy; the plan says why.
			fmt.Println(problem.Errors[0].Detail)
			continue
		}
		plan = must(plan, answer, err)
		fmt.Println(plan.Strategy.Kind, "has", len(plan.Slots), "slots")
	}

	mirror := must(a.MirrorsAPI.MirrorCreate(a.ctx).MirrorCreate(*mirrorvm.NewMirrorCreate(name, shifted)).Execute())
	check(mirror.State == "ready", mirror.State)
	_, err = a.MirrorsAPI.MirrorDelete(a.ctx, mirror.Id).Execute()
	must(0, nil, err)

	destination := mirrorvm.DestinationHostAsDestination(mirrorvm.NewDestinationHost("b"))
	move := mirrorvm.NewMigrationCreate(name, destination)
	look := must(a.MigrationsAPI.MigrationCheckCreate(a.ctx).MigrationCreate(*move).Execute())
	check(look.Migratable, look.Blockers)
	page := must(a.EventsAPI.EventList(a.ctx).Limit(1000).Execute())
	for page.More {
		page = must(a.EventsAPI.EventList(a.ctx).Limit(1000).After(page.NextCursor).Execute())
	}
	cursor := page.NextCursor
	migrate := a.MigrationsAPI.MigrationCreate(a.ctx).MigrationCreate(*move).IdempotencyKey(name + "-move")
	migration := must(migrate.Execute())
	check(must(migrate.Execute()).Id == migration.Id, "a repeated request has no second effect")

	// Events, a few at a time; every call resumes where the last one ended, as a client that was restarted would.
	states := []string{"queued"}
	ended := func() bool {
		last := states[len(states)-1]
		return last == "succeeded" || last == "failed" || last == "canceled"
	}
	for !ended() {
		some := must(a.EventsAPI.EventList(a.ctx).After(cursor).Resource([]string{migration.Id}).Limit(2).Wait("30s").Execute())
		for _, event := range some.Items {
			if event.Type == "migration.state_changed" {
				states = append(states, event.Data.GetState())
			}
		}
		cursor = some.NextCursor
	}
	fmt.Println("states:", strings.Join(states, " "))
	check(states[len(states)-1] == "succeeded", states)
	// It is the destination's from then on, and runs there a moment later.
	b.waitFor(name, "running")

	// Three errors, each acted on by its code.
	refused[*mirrorvm.Guest]("guest_moved")(a.GuestsAPI.GuestStart(a.ctx, name).Execute())
	check(b.get(name).Id == guest.Id, "so it is the other host's now")
	refused[*mirrorvm.Guest]("name_taken")(b.GuestsAPI.GuestCreate(b.ctx).GuestCreate(*definition).Execute())
	check(b.get(name).Id == guest.Id, "so the one that is there will do")
	refused[*mirrorvm.Guest]("precondition_failed")(b.relabel(name, "\"1\"").Execute())
	// So it is read again; until nobody has changed it meanwhile, as the audit does when it has come to an end.
	for {
		answer, r, err := b.relabel(name, fmt.Sprintf("\"%d\"", b.get(name).Generation)).Execute()
		if refusal := problem(err); refusal != nil && refusal.Code == "precondition_failed" {
			continue
		}
		relabelled := must(answer, r, err)
		check(relabelled.Labels["by"] == "go", relabelled.Labels)
		break
	}

	must(b.GuestsAPI.GuestStop(b.ctx, name).Execute())
	b.waitFor(name, "stopped")
	for _, d := range []daemon{b, a} {
		_, err := d.GuestsAPI.GuestDelete(d.ctx, name).Execute()
		must(0, nil, err)
	}
	fmt.Println("the story went well with Go")
}
